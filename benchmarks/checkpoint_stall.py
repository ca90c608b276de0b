"""How much a save in the background holds up the training of the default model.

python benchmarks/checkpoint_stall.py --steps=64 --every=16
python benchmarks/checkpoint_stall.py --table=benchmarks/results/checkpoint_stall.epyc.2026-11-25.json

The first trains and writes JSON, the second prints it as the table in docs/how-to/resume.md. Steps with and
without saves alternate in one run. The stall is the time between two steps in which the state is copied; the steps
beside the writing thread are slower, because it takes a core for the checksums.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from parts.options import BenchmarkOptions, run_benchmark
from parts.runs import SHORT_TEXT, train

from nanogpt.config.options import option


@dataclass(frozen=True)
class StallOptions(BenchmarkOptions):
    """What to measure, or which result to print."""

    steps: int = option(64, "training steps", "steps")
    every: int = option(16, "from one save to the next", "steps")


def measure(options: StallOptions, out: Path) -> dict[str, Any]:
    """One run; the first save, after which memory is still being mapped, is reported with the others."""
    run = train(
        *SHORT_TEXT, f"--max_steps={options.steps}", f"--checkpoint_every={options.every}",
        "--checkpoint_minutes=none", "--target_loss=1e-6",
    )  # fmt: skip
    step_s = {row["step"]: run.step_tokens / row["tokens_per_s"] for row in run.rows}
    # The row of a step is written before its save begins: the pause falls into the time until the next row.
    pause_s = {a["step"]: b["wall_s"] - a["wall_s"] - step_s[b["step"]] for a, b in pairwise(run.rows[:-1])}
    saves = [step for step in pause_s if step % options.every == 0]
    usual_s = median(step_s[step] for step in step_s if step % options.every >= options.every // 2)
    return run.circumstances() | {
        "parameters": 152_791_296,
        "every": options.every,
        "step_s": usual_s,
        "stall_s": [pause_s[step] for step in saves],
        "pause_without_save_s": median(s for step, s in pause_s.items() if step not in saves),
        # of the steps until half-way to the next save, by when the file was written
        "extra_beside_writing_s": [
            sum(step_s[step + i] - usual_s for i in range(1, options.every // 2) if step + i in step_s)
            for step in saves
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    step_s = result["step_s"]
    lines = [
        f"{result['steps']} steps on {result['device']}, {result['dtype']}, a save every {result['every']}:",
        "",
        "| | seconds | steps |",
        "|---|---|---|",
        f"| a step (median) | {step_s:.2f} | 1 |",
    ]
    for name, figures in (
        ("stall of a save", result["stall_s"]),
        ("further time lost beside the writing thread", result["extra_beside_writing_s"]),
    ):
        for what, seconds in (("median", median(figures)), ("worst", max(figures))):
            lines.append(f"| {name} ({what} of {len(figures)}) | {seconds:.2f} | {seconds / step_s:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, StallOptions, measure, table)
