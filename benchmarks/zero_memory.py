"""Peak memory of each rank, DDP beside DeepSpeed's ZeRO 2: the same steps of the same model.

python benchmarks/zero_memory.py --ranks=2 --steps=10
python benchmarks/zero_memory.py --table=benchmarks/results/zero_memory.epyc.2026-11-25.json

The first trains and writes JSON, the second prints it as the table in docs/how-to/deepspeed.md.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from parts.options import BenchmarkOptions, run_benchmark
from parts.runs import SHORT_TEXT, train

from nanogpt.config.options import option
from nanogpt.storage.json_file import write_json

ENGINES = {"DDP": ["--engine=ddp"], "ZeRO 2": ["--engine=deepspeed", "--zero_stage=2"]}


@dataclass(frozen=True)
class MemoryOptions(BenchmarkOptions):
    """What to measure, or which result to print."""

    ranks: int = option(2, "processes on this machine")
    steps: int = option(10, "training steps of each engine", "steps")


def measure(options: MemoryOptions, out: Path) -> dict[str, Any]:
    """Each engine's run."""
    result = {}
    for name, words in ENGINES.items():
        run = train(*words, *SHORT_TEXT, f"--max_steps={options.steps}", ranks=options.ranks)
        result[name] = run.circumstances() | {
            "peak_memory_bytes": run.report["peak_memory_bytes"],
            "median_step_s": run.step_tokens / median(row["tokens_per_s"] for row in run.rows),
            "last_loss": run.rows[-1]["loss"],
            "last_grad_norm": run.rows[-1]["grad_norm"],
        }
        write_json(out, result)  # after each: they take minutes
    return result


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    any_engine = next(iter(result.values()))
    steps, dtype, device = (any_engine[key] for key in ("steps", "dtype", "device"))
    ranks = len(any_engine["peak_memory_bytes"])
    lines = [
        f"{ranks} ranks on {device}, {dtype}, {steps} steps:",
        "",
        "| engine | peak memory of a rank | of DDP's | loss of the last step | its gradient norm |",
        "|---|---|---|---|---|",
    ]
    for name, figures in result.items():
        peak = max(figures["peak_memory_bytes"])
        share = peak / max(any_engine["peak_memory_bytes"])
        lines.append(
            f"| {name} | {peak / 1e9:.2f} GB | {share:.0%} | {figures['last_loss']:.6f} | "
            f"{figures['last_grad_norm']:.6f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, MemoryOptions, measure, table)
