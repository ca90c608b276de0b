"""Which curve does the fixed job of `nanogpt accept` follow, and how far do right computations stray from it?

python benchmarks/golden_curves.py --python=venv_of_another_torch/bin/python
python benchmarks/golden_curves.py --table=benchmarks/results/golden_curves.zen5.2026-12-01.json

The first writes JSON and nanogpt/assets/golden_curves.json, which it follows from. Every seed is trained by one thread
in fp32 and bf16; then with more threads, other instructions, other libraries of products, on several ranks with every
engine, and by another torch. A band is SAFETY times the furthest that any of them was off so far, over all seeds, and
LEAST at least. In bf16 the fp32 curve counts too: another device rounds otherwise, and is about as far from this one's
bf16 as that is.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from parts import REPOSITORY
from parts.options import BenchmarkOptions, run_benchmark

from nanogpt.acceptance.stages.numerics import DTYPES, JOB, STEPS, job_config, train_curve
from nanogpt.config.options import option
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import FORMAT_VERSION, to_json, write_json

ASSET = REPOSITORY / "nanogpt" / "assets" / "golden_curves.json"
SAFETY = 4.0
# What a band allows at least, as a share. No GPU is on record, whose sums have another order: some 100 roundings of an
# fp32 loss, and so many times what any other way to compute in bf16 was off.
LEAST = {"fp32": 1e-5, "bf16": 5e-4}
ALONE = {  # how one process computes: the environment
    "1 thread": {},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "no vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "oneDNN with SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "MKL for any CPU": {"MKL_CBWR": "COMPATIBLE"},
}
# Of the first seeds, on so many ranks. bf16 that is emulated takes a minute a curve: there are fewer of it.
TOGETHER = {
    "fp32": {2: ("ddp", "sharded", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"), 4: ("ddp", "sharded", "ZeRO 2")},
    "bf16": {2: ("ddp", "sharded", "ZeRO 3")},
}
SEEDS_TOGETHER = {"fp32": 2, "bf16": 1}


@dataclass(frozen=True)
class GoldenOptions(BenchmarkOptions):
    """What to train."""

    seeds: int = option(5, "seeds 0 and on", "seeds")
    python: str | None = option(None, "a Python with another torch, which trains too; none: no other torch")


def train_cell(cell: dict[str, Any]) -> None:
    """In a process of its own: train, and write the curve."""
    engine, _, stage = cell["engine"].replace("ZeRO", "deepspeed").partition(" ")
    world = World.from_env()
    with world.process_group(even_alone=True):
        config = job_config(engine=engine, zero_stage=int(stage) if stage else None, **cell["options"])
        curve = train_curve(config, world, cell["engine"], steps=cell["steps"])
    if world.is_first:
        write_json(Path(cell["out"]), to_json(curve))


def run_cell(
    engine: str, ranks: int, dtype: str, seed: int, *, python: str = sys.executable, environ: dict[str, str]
) -> dict[str, Any]:
    """A curve, as JSON."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "curve.json"
        cell = {"engine": engine, "steps": STEPS, "options": {"dtype": dtype, "seed": seed}, "out": str(out)}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        subprocess.run(
            [python, *launcher, __file__, f"--cell={json.dumps(cell)}"], check=True, stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | environ,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def measure(options: GoldenOptions, out: Path) -> dict[str, Any]:
    """Every cell, with the asset as a by-product."""
    curves: list[dict[str, Any]] = []

    def add(how: str, engine: str, ranks: int, dtype: str, seed: int, **given: Any) -> None:
        given = {"environ": {}} | given
        curve = run_cell(engine, ranks, dtype, seed, **given)
        curves.append({"how": how, "dtype": dtype, "seed": seed, **{k: curve[k] for k in ("losses", "grad_norms")}})
        print(f"{dtype} seed {seed}: {how}", file=sys.stderr, flush=True)

    for dtype in DTYPES:
        for seed in range(options.seeds if dtype == "fp32" else 2):
            for how, environ in ALONE.items():
                add(how, "single", 1, dtype, seed, environ=environ)
            if options.python:
                add("another torch", "single", 1, dtype, seed, python=options.python)
            if seed < SEEDS_TOGETHER[dtype]:
                for ranks, engines in TOGETHER[dtype].items():
                    for engine in engines:
                        add(f"{engine} on {ranks} ranks", engine, ranks, dtype, seed)
    result = {
        "device": World.from_env().device_name(), "torch": torch.__version__, "capability":
        torch.backends.cpu.get_cpu_capability(), "job": JOB, "safety": SAFETY, "curves": curves,
    }  # fmt: skip
    write_json(ASSET, asset(result))
    return result


def asset(result: dict[str, Any]) -> dict[str, Any]:
    """What assets/golden_curves.json holds."""
    return {"format_version": FORMAT_VERSION, **{dtype: golden(result, dtype) for dtype in DTYPES}}


def golden(result: dict[str, Any], dtype: str) -> dict[str, list[float]]:
    """The curve of the first seed, and the bands."""
    first = _reference(result, dtype, 0)
    return {
        "losses": first["losses"], "grad_norms": first["grad_norms"],
        "loss_band": band(result, dtype, "losses"), "grad_norm_band": band(result, dtype, "grad_norms"),
    }  # fmt: skip


def band(result: dict[str, Any], dtype: str, what: str) -> list[float]:
    """How far a figure may be off at each step, as a share of it."""
    off = [
        deviation(curve[what], _reference(result, dtype, curve["seed"])[what])
        for curve in result["curves"]
        if curve["dtype"] == dtype or (dtype == "bf16" and curve["how"] == "1 thread" and curve["seed"] < 2)
    ]
    furthest = accumulate((max(step) for step in zip(*off, strict=True)), max)
    return [max(LEAST[dtype], SAFETY * most) for most in furthest]


def deviation(figures: list[float], right: list[float]) -> list[float]:
    """How far each figure is off, as a share of the right one."""
    return [abs(a / b - 1) for a, b in zip(figures, right, strict=True)]


def _reference(result: dict[str, Any], dtype: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = next(
        c for c in result["curves"] if (c["how"], c["dtype"], c["seed"]) == ("1 thread", dtype, seed)
    )
    return found


def table(result: dict[str, Any]) -> str:
    """How far each way to compute was off at most, over all seeds and steps."""
    lines = [
        f"On {result['device']}, torch {result['torch']}; {len(result['curves'])} curves of {STEPS} steps, the "
        f"furthest that a step was off:", "", "| computed by | fp32 loss | fp32 norm | bf16 loss | bf16 norm |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for how in dict.fromkeys(curve["how"] for curve in result["curves"]):
        figures = [
            max(
                (
                    max(deviation(curve[what], _reference(result, dtype, curve["seed"])[what]))
                    for curve in result["curves"]
                    if (curve["how"], curve["dtype"]) == (how, dtype)
                ),
                default=None,
            )
            for dtype in DTYPES
            for what in ("losses", "grad_norms")
        ]
        lines.append(f"| {how} | {' | '.join('' if figure is None else f'{figure:.1e}' for figure in figures)} |")
    ends = [f"{band(result, dtype, what)[-1]:.1e}" for dtype in DTYPES for what in ("losses", "grad_norms")]
    lines.append(f"| **band at step {STEPS}** | {' | '.join(ends)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("--cell="):
        train_cell(json.loads(sys.argv[1].removeprefix("--cell=")))
        os._exit(0)  # gloo's threads may abort a process that ends
    run_benchmark(__file__, __doc__, GoldenOptions, measure, table)
