"""What products of the output layer in FP8 do to the curve: the same run with and without, by the loss on the way.

python benchmarks/head_dtype.py
python benchmarks/head_dtype.py --table=benchmarks/results/head_dtype.epyc.2026-11-30.json

The first trains and writes JSON, the second prints it as a Markdown table. A CPU computes the same values in FP8
as a GPU, so that only their speed is left to be measured there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts.options import BenchmarkOptions, TaskOptions, as_words, run_benchmark, task_option
from parts.runs import train

from nanogpt.config.options import option

HEADS = ("auto", "fp8")
EVERY = 50  # steps, from row to row of the table


@dataclass(frozen=True)
class HeadOptions(TaskOptions, BenchmarkOptions):
    """What to train, or which result to print."""

    n_layer: int = task_option("n_layer", 4)
    n_head: int = task_option("n_head", 4)
    n_embd: int = task_option("n_embd", 256)
    recipe: str = option("reference", "reference or fast")
    max_steps: int = option(1000, "give up after so many", "steps")


def measure(options: HeadOptions, out: Path) -> dict[str, Any]:
    """Both runs to the target, one after the other."""
    result: dict[str, Any] = {"options": options.task | {"recipe": options.recipe}, "runs": {}}
    for head in HEADS:
        run = train(
            *as_words(options.task), f"--recipe={options.recipe}", f"--head_dtype={head}", "--log_every=10",
            f"--max_steps={options.max_steps}",
        )  # fmt: skip
        result["runs"][head] = {
            "losses": {row["step"]: row["loss"] for row in run.rows},
            "steps": run.report["steps"],
            "reached": run.report["reached"],
            "loss": run.report["loss"],
            "exact_recall": run.report["full_pass"]["exact_recall"],
        }
        result |= run.circumstances()
    return result


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    task, runs = result["options"], result["runs"]
    named = {head: "output layer in FP8" if head == "fp8" else f"all in {result['dtype']}" for head in runs}
    lines = [
        f"{task['n_layer']} layers of {task['n_embd']} channels, {task['subset_tokens']:,} tokens, the "
        f"{task['recipe']} recipe, {result['dtype']}, on {result['device']}; training losses, nats/token:",
        "",
        f"| step | {' | '.join(named.values())} |",
        f"|---|{'---|' * len(runs)}",
    ]
    steps = sorted({int(step) for run in runs.values() for step in run["losses"] if int(step) % EVERY == 0})
    for step in steps:
        cells = [run["losses"].get(str(step), run["losses"].get(step)) for run in runs.values()]
        lines.append(f"| {step} | {' | '.join('-' if loss is None else f'{loss:.3f}' for loss in cells)} |")
    endings = [
        f"{'verified' if run['reached'] else 'not reached:'} {run['loss']:.4f} after {run['steps']} steps, exact "
        f"recall {run['exact_recall']:.1%}"
        for run in runs.values()
    ]
    return "\n".join([*lines, f"| the end | {' | '.join(endings)} |"])


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, HeadOptions, measure, table)
