"""Time to the verified target: both recipes beside what a user would take instead.

python benchmarks/time_to_target.py --seeds=3
python benchmarks/time_to_target.py --table=benchmarks/results/time_to_target.zen5.2026-11-29.json

The first trains and writes JSON, the second prints it as a Markdown table. The contenders run one after the other,
seed by seed: a machine that drifts within a seed's runs is in their ratio. All have the same text, windows, number of
parameters and full pass. The clock is each one's time in training, without building the model and importing torch. Ours
has its full passes in it; those that end the others are not, as their users make none. Beside it stands what a person
waits for ours: from the command's launch to the verified target, so all but the scores.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from math import floor, inf, log10
from pathlib import Path
from statistics import median
from typing import Any

from parts import REPOSITORY
from parts.options import BenchmarkOptions, TaskOptions, as_words, run_benchmark, task_option
from parts.runs import train
from parts.turns import AUTOCAST, FAST, OURS, PLAIN, TRAINER

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import option
from nanogpt.storage.json_file import read_json, write_json

RECIPES = {"reference": OURS, "fast": FAST}
LOOPS = {"fp32": PLAIN, "bf16": AUTOCAST, "trainer": TRAINER}
CONTENDERS = RECIPES | LOOPS


@dataclass(frozen=True)
class TargetOptions(TaskOptions, BenchmarkOptions):
    """What to measure, or which result to print."""

    seeds: int = option(3, "runs of each contender")
    n_layer: int = task_option("n_layer", 4)
    n_head: int = task_option("n_head", 4)
    n_embd: int = task_option("n_embd", 256)
    context_length: int = task_option("context_length", 32)
    subset_tokens: int = task_option("subset_tokens", 1024)
    max_steps: int = option(2000, "a contender that needs more has failed", "steps")
    contenders: str = option(",".join(CONTENDERS), "who runs, with commas between")

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.contenders.split(",")
        if not set(words) <= set(CONTENDERS) or set(words).isdisjoint(RECIPES):
            raise ConfigError(
                f"--contenders={self.contenders} must be some of {','.join(CONTENDERS)}, with commas between and "
                f"{' or '.join(RECIPES)} among them"
            )


def measure(options: TargetOptions, out: Path) -> dict[str, Any]:
    """Every contender with every seed, one after the other."""
    result: dict[str, Any] = {"options": options.task | {"max_steps": options.max_steps}, "runs": []}
    for seed in range(options.seeds):
        words = as_words(result["options"] | {"seed": seed})
        for word in options.contenders.split(","):
            if word == "trainer" and not find_spec("accelerate"):
                continue
            if word in RECIPES:
                run = train(*words, f"--recipe={word}", "--checkpoint_minutes=none")
                told = {key: run.report[key] for key in ("reached", "steps", "train_s", "launch_s", "loss")}
                told |= {"exact_recall": run.report["recall"]["exact_recall"]}
                result |= run.circumstances() | {"flops_per_token": run.report["flops_per_token"]}
            else:
                told = run_plain(f"--loop={word}", *words)
            result["runs"].append({"contender": CONTENDERS[word], "seed": seed} | told)
            write_json(out, result)  # after each run: they take minutes
    return result


def run_plain(*words: str) -> dict[str, Any]:
    """What plain_loop.py says of a run of it. Raises SystemExit where the run fails."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "plain.json")
        script = REPOSITORY / "benchmarks" / "plain_loop.py"
        done = subprocess.run([sys.executable, script, *words, f"--out={out}"], capture_output=True, text=True)
        if done.returncode not in (0, 3):  # the target is reached, or the steps are spent
            raise SystemExit(f"{' '.join(words)} left with status {done.returncode}:\n{done.stderr}")
        told = read_json(out, of="a result")
        return {key: told[key] for key in ("reached", "steps", "train_s", "passes_s", "passes", "loss")}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    shape = result["options"]
    by_contender = {name: [run for run in result["runs"] if run["contender"] == name] for name in CONTENDERS.values()}
    by_contender = {name: found for name, found in by_contender.items() if found}
    seeds = len({run["seed"] for run in result["runs"]})
    lines = [
        f"{shape['n_layer']} layers of {shape['n_embd']} channels, {shape['subset_tokens']:,} tokens in windows of "
        f"{shape['context_length']}, {result['dtype']} on {result['device']}, torch {result['versions']['torch']}, "
        f"{f'{seeds} seeds, medians' if seeds > 1 else 'one seed'}; whoever had not reached the target after "
        f"{shape['max_steps']:,} steps was stopped:",
        "",
        "| | reached | steps | seconds | from launch | the plain loop's seconds / these | exact recall at random |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in by_contender.items():
        (steps, stopped), (seconds, _) = (_typical(found, key) for key in ("steps", "train_s"))
        launch, recall = "not measured", "not measured"
        if name in RECIPES.values():
            launch = _s(_typical(found, "launch_s")[0], at_least=stopped)
            recall = f"{median(run['exact_recall'] for run in found):.1%}"
        ratio = "-"
        if PLAIN in by_contender:
            plain_s, plain_stopped = _typical(by_contender[PLAIN], "train_s")
            if not stopped or name == PLAIN:  # of two lower bounds there is no ratio
                ratio = _three_digits(plain_s / seconds, at_least=plain_stopped and not stopped)
        lines.append(
            f"| {name} | {sum(run['reached'] for run in found)} of {len(found)} | "
            f"{'> ' if stopped else ''}{steps:g} | {_s(seconds, at_least=stopped)} | {launch} | {ratio} | {recall} |"
        )
    return "\n".join(lines)


def _typical(runs: list[dict[str, Any]], key: str) -> tuple[float, bool]:
    """The median of runs' key, and whether it is but a lower bound, as most were stopped before the target."""
    found = median(run[key] if run["reached"] else inf for run in runs)
    return (found, False) if found < inf else (median(run[key] for run in runs), True)


def _s(seconds: float, *, at_least: bool) -> str:
    if seconds < 100:
        return _three_digits(seconds, at_least=at_least)
    return f"> {floor(seconds):,}" if at_least else f"{seconds:,.0f}"


def _three_digits(figure: float, *, at_least: bool) -> str:
    """A positive figure; '> ' and rounded down where it is but a lower bound."""
    if not at_least:
        return f"{figure:.3g}"
    unit = 10.0 ** (floor(log10(figure)) - 2)
    return f"> {floor(figure / unit) * unit:.3g}"


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, TargetOptions, measure, table)
