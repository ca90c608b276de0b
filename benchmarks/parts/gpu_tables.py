"""What on_gpu.py has measured, in Markdown: a table for each section that came to something.

print("\n\n".join(tables(result)))
"""

from collections.abc import Callable, Iterator
from math import inf
from statistics import median
from typing import Any

PHASES = ("data", "compute", "communication", "checkpoint", "full_pass", "rest")
Cells = list[str]


def tables(result: dict[str, Any]) -> Iterator[str]:
    """What was measured on, how each section ended, then each section's own table."""
    versions = result["code"]["versions"]
    devices = result["gpus"] or [result["device"]]
    yield (
        f"{len(devices)} x {devices[0]}, torch {versions['torch']}, CUDA {result['cuda']}, NCCL {result['nccl']}, "
        f"{result['cores']} cores, {result['began']}, {result['seconds']:.0f} s"
        f"{', a rehearsal with tiny models' if result['options']['rehearse'] == 'true' else ''}:"
    )
    sections = result["sections"]
    yield markdown(
        ["section", "how it ended", "seconds"],
        [[name, _ending(told), f"{told.get('seconds', 0):.0f}"] for name, told in sections.items()],
    )
    for name, told in sections.items():
        if told.get("result"):
            yield f"{name}:\n\n{TABLES[name](told['result'])}"


def markdown(head: Cells, rows: list[Cells]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ending(told: dict[str, Any]) -> str:
    if why := told.get("why"):
        return f"{told['status']}: {why}"
    last = next((line for line in reversed(told.get("last_lines", [])) if line.strip()), "")
    return f"{told['status']}: {last.strip()[:100]}".replace("|", "/") if last else told["status"]


def _tests(result: dict[str, Any]) -> str:
    rows = [
        [one["name"], one["outcome"], f"{one['seconds']:.0f}", one["why"].splitlines()[0][:100] if one["why"] else ""]
        for one in result["tests"]
    ]
    return markdown(["test", "outcome", "seconds", "why"], [[cell.replace("|", "/") for cell in row] for row in rows])


def _collectives(result: dict[str, Any]) -> str:
    rows = [
        [
            one["name"],
            _yes(one["captured"]),
            _yes(one["right"]),
            _ms(one["seconds"][0]),
            _ms(median(one["seconds"][2:])),
        ]
        for one in result["collectives"]
    ]
    teardown_s = result.get("teardown_s")
    rows.append(["teardown", "", "not reached" if teardown_s is None else "done", _ms(teardown_s), ""])
    head = [f"{result['message_bytes']:,} bytes, one rank", "captured", "right", "first", "then"]
    return markdown(head, rows)


def _steps(result: dict[str, Any]) -> str:
    """Losses are compared with those of the single engine, kernel by kernel, on the same batches."""
    rows = []
    for row in result["steps"]:
        named = [
            f"{row['windows']} x {row['context_length']:,}",
            "Muon" if row["recipe"] == "fast" else "AdamW",
            _how(row),
        ]
        if failure := row.get("failure"):
            rows.append([*named, failure.replace("|", "/"), *[""] * 5])
            continue
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
        memory = "" if row["allocated_bytes"] is None else f"{row['allocated_bytes'] / 1e9:.1f} GB"
        alone_s, row_s = median(row["alone_s"]), median(row["in_a_row_s"])
        rows.append(
            [*named, _ms(alone_s), _ms(row_s), mfu, memory, f"{row['ready_s']:.1f} s", _apart(row, result["steps"])]
        )
    head = ["a step", "update", "how", "alone", "in a row", "MFU", "memory", "until ready", "losses off single's"]
    return markdown(head, rows)


def _how(row: dict[str, Any]) -> str:
    wanted = "graphs" if row["graphs"] else "kernel by kernel"
    got = row.get("cuda_graphs", row["graphs"])
    engine = row["engine"] + (" with collectives" if row["collectives"] else "")
    compiled = ", not compiled although asked" if row.get("not_compiled") else ", compiled" if row["compiled"] else ""
    head = ", head in FP8" if row["head_dtype"] == "fp8" else ""
    return f"{engine}, {wanted}{'' if got == row['graphs'] else ' (not captured)'}{compiled}{head}"


def _apart(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The largest relative difference of the losses from those of the plainest way that was measured."""
    same = ("windows", "context_length", "recipe")
    plain = next((r for r in rows if "losses" in r and all(r[key] == row[key] for key in same)), row)
    pairs = zip(row["losses"], plain["losses"], strict=False)
    return f"{max((abs(a - b) / abs(b) for a, b in pairs), default=inf):.1g}" if plain is not row else ""


def _run(result: dict[str, Any]) -> str:
    """Where the seconds of training went, by the rows of metrics.jsonl."""
    rows = result["rows"]
    summed = {phase: sum(row["phases_s"].get(phase, 0.0) for row in rows) for phase in PHASES}
    after_s = result["train_s"] - rows[-1]["wall_s"]
    first, *others = rows
    last_s = others[-1]["wall_s"] - first["wall_s"] if others else 0.0
    step_s = median(row["step_s"] for row in rows if row["step_s"])
    told = (
        f"{result['steps']} steps, {'reached' if result['reached'] else 'not reached'}, {result['train_s']:.2f} s in "
        f"training and {result['launch_s']:.1f} s from launch; a step {_ms(step_s)}; "
        f"up to the first row, of step {first['step']}, {first['wall_s']:.2f} s, from it to the last {last_s:.2f} s, "
        f"after that {after_s:.2f} s; {sum(row['full_pass_loss'] is not None for row in rows)} full passes"
    )
    cells = [f"{summed[phase]:.2f} s" for phase in PHASES]
    return f"{told}:\n\n{markdown(list(PHASES), [cells])}"


def _passes(result: dict[str, Any]) -> str:
    rows = [
        [f"{one['rows']}{' (as planned)' * (one['rows'] == result['plan_rows'])}", _ms(median(one["full_pass_s"][1:])),
         _ms(median(one["scores_s"][1:])), f"{one['memory_bytes'] / 1e9:.1f} GB"]
        for one in result["passes"]
    ]  # fmt: skip
    of = result["passes"][0]
    head = [
        f"windows at once, of {of['windows']}",
        f"a full pass in {of['dtype']}",
        "scores in fp32",
        "most memory so far",
    ]
    return markdown(head, rows)


def _parity(result: dict[str, Any]) -> str:
    curves = result["curves"]
    rows = []
    for name, curve in curves.items():
        pairs = [
            (a, b) for one, other in zip(curve, curves["single"], strict=False) for a, b in zip(one, other, strict=True)
        ]
        off = max(abs(a - b) / abs(b) for a, b in pairs)
        rows.append([name, str(1 if name == "single" else result["ranks"]), str(len(curve)), f"{off:.1g}"])
    return markdown(["engine", "ranks", "steps", "losses and norms off single's"], rows)


def _all_reduces(result: dict[str, Any]) -> str:
    """As algorithm bandwidth: bytes of the message over seconds."""
    measured = result["all_reduce_s"]
    sizes = list(next(iter(measured.values())))
    rows = [
        [f"{int(n):,}", *(f"{_ms(by[n])}, {int(n) / by[n] / 1e9:.3g} GB/s" for by in measured.values())] for n in sizes
    ]
    return markdown(["bytes", *(f"{ranks} ranks" for ranks in measured)], rows)


def _scaling(result: dict[str, Any]) -> str:
    alone_s = median(result["steps"][0]["step_s"])
    rows = [
        [row["engine"], str(row["ranks"]), _yes(row["cuda_graphs"]), _ms(median(row["step_s"])),
         f"{alone_s / median(row['step_s']):.2f}", f"{max(row['memory_bytes']) / 1e9:.1f} GB"]
        for row in result["steps"]
    ]  # fmt: skip
    return markdown(["engine", "ranks", "graphs", "a step", "speed-up", "memory of a rank"], rows)


def _yes(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3g} ms"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "gpu_tests": _tests,
    "collectives": _collectives,
    **dict.fromkeys(("steps", "long_steps", "compiled_steps", "long_compiled"), _steps),
    **dict.fromkeys(("default_run", "fast_run"), _run),
    "full_passes": _passes,
    "ranks_parity": _parity,
    "ranks_all_reduce": _all_reduces,
    "ranks_steps": _scaling,
}
