"""The memory that preflight predicts beside what ranks were seen to hold.

python benchmarks/predicted_memory.py
python benchmarks/predicted_memory.py --table=benchmarks/results/predicted_memory.zen5.2026-12-01.json

The first trains three models with every engine and writes JSON, the second prints it as the table in
docs/explanation/memory.md.
"""

from pathlib import Path
from typing import Any

import torch
from parts.options import BenchmarkOptions, as_words, run_benchmark
from parts.runs import train

from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.plan.plan import make_plan
from nanogpt.storage.json_file import write_json

# Steep enough for the average of the weights to begin; saves are within what is measured.
SHORT = {"subset_tokens": 129, "target_loss": 0.12, "log_every": 1, "dtype": "fp32"}
MODELS = {
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "learning_rate": 3e-3, "max_steps": 60},
    "middle": {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 256,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 24,
        "checkpoint_every": 5,
    },
    "Muon's": {  # few tokens, so that what the update holds is not hidden by activations
        "recipe": "fast",
        "n_layer": 6,
        "n_head": 12,
        "n_embd": 768,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 40,
        "checkpoint_every": 10,
    },
}
CELLS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks and options
    "single": (1, {}),
    "ddp": (2, {}),
    "ZeRO 0": (2, {"engine": "deepspeed", "zero_stage": 0}),
    "ZeRO 1": (2, {"engine": "deepspeed", "zero_stage": 1}),
    "ZeRO 2": (2, {"engine": "deepspeed", "zero_stage": 2}),
    "ZeRO 3": (2, {"engine": "deepspeed", "zero_stage": 3}),
}


def measure(_: BenchmarkOptions, out: Path) -> dict[str, Any]:
    """Every model with every engine that takes it."""
    cells: list[dict[str, Any]] = []
    for model, shape in MODELS.items():
        for engine, (ranks, words) in CELLS.items():
            asked = SHORT | shape | words
            if asked.get("recipe") == "fast" and asked.get("zero_stage") == 3:  # refused
                continue
            run = train(*as_words(asked), ranks=ranks)
            lr = run.report["final_learning_rate"]
            cells.append(
                {
                    "model": model, "engine": engine, "ranks": ranks, "options": asked,
                    "averaged": lr < shape["learning_rate"], "peak_memory_bytes": run.report["peak_memory_bytes"],
                }
                | run.circumstances()
            )  # fmt: skip
            write_json(out, {"cells": cells})  # after each: they take minutes
    return {"cells": cells}


def predicted_bytes(cell: dict[str, Any]) -> int:
    """What preflight says of a measured cell today."""
    world = World(rank=0, local_rank=0, size=cell["ranks"], device=torch.device("cpu"))
    return make_plan(TrainConfig(**cell["options"]), world).memory.total


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = ["| model | engine | ranks | predicted | measured, fullest rank | off by |", "|---|---|---|---|---|---|"]
    for cell in result["cells"]:
        predicted, measured = predicted_bytes(cell), max(cell["peak_memory_bytes"])
        lines.append(
            f"| {cell['model']} | {cell['engine']} | {cell['ranks']} | {predicted / 1e9:.2f} GB | "
            f"{measured / 1e9:.2f} GB | {predicted / measured - 1:+.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, BenchmarkOptions, measure, table)
