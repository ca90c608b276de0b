"""Does a change leave what is computed as it was? Small runs in fp32, every engine and both recipes, bit for bit.

python benchmarks/bit_for_bit.py --out=before.json                      # at the commit before
python benchmarks/bit_for_bit.py --out=after.json --against=before.json # after the change, on the same machine

Kept of each run: its rows without clocks (every step's loss, gradient norm and rate), its report without clocks and
versions, and the SHA-256 of its weights. Exit status 1 and the names of what differs where anything does.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts.options import run_script
from parts.runs import train_in

from nanogpt.config.options import Options, option

TINY = (
    "--n_layer=2", "--n_head=2", "--n_embd=48", "--context_length=32", "--subset_tokens=200", "--batch_size=12",
    "--dtype=fp32", "--log_every=1",
)  # fmt: skip
REFERENCE, FAST = ("--learning_rate=3e-3",), ("--recipe=fast", "--learning_rate=2e-3")
# Averages weights and lowers the rate from about step 20 on, and reaches its target about step 40.
NEAR = ("--subset_tokens=64", "--batch_size=4", "--learning_rate=6e-3", "--target_loss=0.3", "--ema=0.5")
# name -> (ranks, options); a run called "resume" is first ended by its budget half-way, a "near" one when it averages.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, REFERENCE),
    "single, fast": (1, FAST),
    "single, fixed phase": (1, (*REFERENCE, "--phase=fixed", "--stride=16")),
    "single, accumulation": (1, (*REFERENCE, "--micro_batch_size=5")),
    "single, resume": (1, REFERENCE),
    "single, to the target": (1, (*REFERENCE, "--target_loss=2.5")),
    "ddp on 2": (2, REFERENCE),
    "ddp on 2, fast": (2, FAST),
    "ddp on 2, resume": (2, REFERENCE),
    "ddp on 3, accumulation": (3, (*REFERENCE, "--micro_batch_size=2")),
    **{f"ZeRO {stage} on 2": (2, (*REFERENCE, "--engine=deepspeed", f"--zero_stage={stage}")) for stage in range(4)},
    "ZeRO 1 on 2, fast": (2, (*FAST, "--engine=deepspeed", "--zero_stage=1")),
    "single, near": (1, NEAR),
    "single, near, resume": (1, NEAR),
    "single, fast, near": (1, (*NEAR, "--recipe=fast", "--learning_rate=4e-3")),
    "ddp on 2, near, resume": (2, NEAR),
    "ZeRO 2 on 2, near, resume": (2, (*NEAR, "--engine=deepspeed", "--zero_stage=2")),
    "ZeRO 3 on 2, near, resume": (2, (*NEAR, "--engine=deepspeed", "--zero_stage=3")),
}
# Of rows and reports: what a clock, the machine's memory or the commit decides.
CLOCKS = (
    "_s", "memory_bytes", "mfu", "time_share", "slowest_rank", "_host", "_ratio", "versions", "git_commit",
    "format_version",
)  # fmt: skip


@dataclass(frozen=True)
class CompareOptions(Options):
    """What to keep, and what to hold it against."""

    out: str = option("bit_for_bit.json", "where what was computed goes")
    against: str | None = option(None, "the result of another commit on this machine; none: only keep it")


def computed(name: str) -> dict[str, Any]:
    """What a run of RUNS computed."""
    ranks, options = RUNS[name]
    with tempfile.TemporaryDirectory() as directory:
        out_dir = Path(directory, "out")
        words = list({word.partition("=")[0]: word for word in (*TINY, *options)}.values())  # the later one counts
        near = "near" in name
        if name.endswith("resume"):
            train_in(out_dir, *words, f"--max_steps={30 if near else 10}", ranks=ranks, threads=1)
        steps = 200 if near or name.endswith("target") else 20
        run = train_in(out_dir, *words, f"--max_steps={steps}", ranks=ranks, threads=1)
    return {"rows": [_without_clocks(row) for row in run.rows], "report": _without_clocks(run.report)}


def _without_clocks(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if not name.endswith(CLOCKS)}


def compare(options: CompareOptions) -> int:
    """Compute all runs, keep the result, compare."""
    before = json.loads(Path(options.against).read_text()) if options.against else {}
    result, differing = {}, []
    for name in RUNS:
        result[name] = computed(name)
        same = result[name] == before.get(name)
        if options.against and not same:
            differing.append(name)
        losses = [row["loss"] for row in result[name]["rows"]]
        told = ("the same" if same else "DIFFERS") if options.against else "kept"
        print(f"{name}: {len(losses)} steps, {losses[-1]!r}, {result[name]['report']['weights_sha256'][:12]}: {told}")
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    if differing:
        print(f"differs: {', '.join(differing)}", file=sys.stderr)
    return int(bool(differing))


if __name__ == "__main__":
    run_script(__file__, __doc__, CompareOptions, compare)
