"""What it comes to: results of time_to_target.py and step_time.py side by side, a column each, for the README.

python benchmarks/summary.py benchmarks/results/step_time.zen5.2026-11-29.json benchmarks/results/...
"""

from dataclasses import MISSING, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from parts.options import read_result, run_script

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import Options, option


@dataclass(frozen=True)
class SummaryOptions(Options):
    """What is printed."""

    results: tuple[str, ...] = option(MISSING, "results of time_to_target.py or step_time.py, of one model")


def summarise(options: SummaryOptions) -> int:
    """Print the table."""
    columns = dict(column(Path(path)) for path in options.results)
    names = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {name} | {' | '.join(cells.get(name, '') for cells in columns.values())} |" for name in names]
    print("\n".join(lines))
    return 0


def column(path: Path) -> tuple[str, dict[str, str]]:
    """Its heading, and a cell for each contender of the result."""
    result = read_result(path)
    if "step_s" in result:
        return f"a step, {result['device']}", {name: f"{median(s):.2f} s" for name, s in result["step_s"].items()}
    if "runs" not in result:
        raise ConfigError(f"{path} is of neither time_to_target.py nor step_time.py")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        by_name.setdefault(run["contender"], []).append(run)
    return f"trained to the target, {result['device']}", {name: to_target(runs) for name, runs in by_name.items()}


def to_target(runs: list[dict[str, Any]]) -> str:
    """Median time in training and steps; of a contender that did not get there within the steps it had, that."""
    seconds, steps = (median(run[key] for run in runs) for key in ("train_s", "steps"))
    text = f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.2g} s"
    return f"{'' if all(run['reached'] for run in runs) else 'not in '}{text}, {steps:,.0f} steps"


if __name__ == "__main__":
    run_script(__file__, __doc__, SummaryOptions, summarise)
