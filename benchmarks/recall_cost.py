"""What a recital by heart costs beyond the target loss.

python benchmarks/recall_cost.py --seeds=3 --n_layer=6 --n_embd=256 --n_head=4
python benchmarks/recall_cost.py --table=benchmarks/results/recall_cost_small.zen5.2026-12-01.json

A run for each recipe and seed, to the target loss; where that has not brought the whole text back, another one goes on
from its checkpoint with --target_recall=1. A run that is given both targets from the start takes the same steps, but
its passes come at others (tests/runs/test_target_recall.py). The runs are kept in --runs: those that have ended are
not made again.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from parts.options import BenchmarkOptions, TaskOptions, as_words, run_benchmark
from parts.runs import Trained, train_in

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import option
from nanogpt.storage.json_file import write_json
from nanogpt.storage.report import exit_reason

RECIPES = ("reference", "fast")
ENDINGS = ("target_reached", "max_steps")


@dataclass(frozen=True)
class RecallOptions(TaskOptions, BenchmarkOptions):
    """What to measure, or which result to print."""

    seeds: int = option(3, "runs of each recipe")
    seed: int = option(0, "the first run's; the next ones follow")
    recipes: str = option(",".join(RECIPES), "which recipes, with commas between")
    ema: float = option(0.97, "of the average that is judged, as train_overfit.py has it")
    on_plateau: str = option("decay", "decay or none, as train_overfit.py has it")
    max_steps: int = option(3000, "a run that needs more has failed", "steps")
    runs: str = option("runs/recall_cost", "directory of the runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.recipes.split(",")) <= set(RECIPES):
            raise ConfigError(f"--recipes={self.recipes} must be some of {','.join(RECIPES)}, with commas between")


def measure(options: RecallOptions, out: Path) -> dict[str, Any]:
    """Every recipe with every seed, one after the other."""
    asked = options.task | {"max_steps": options.max_steps, "ema": options.ema, "on_plateau": options.on_plateau}
    result: dict[str, Any] = {"options": asked, "runs": []}
    for seed in range(options.seed, options.seed + options.seeds):
        for recipe in options.recipes.split(","):
            words = as_words(asked | {"seed": seed, "recipe": recipe, "checkpoint_minutes": "none"})
            directory = Path(options.runs, f"{recipe}_{seed}")
            plain = ended(directory / "loss", asked, *words)
            run = {"recipe": recipe, "seed": seed, "loss": told(plain), "recall": told(plain)}
            if plain.report["reached"] and not is_by_heart(run["loss"]):
                words += [f"--resume={directory / 'loss'}", "--target_recall=1"]
                run["recall"] = told(ended(directory / "recall", asked, *words))
            result |= plain.circumstances()
            result["runs"].append(run)
            write_json(out, result)  # after each run: they take minutes
    return result


def ended(out_dir: Path, asked: dict[str, Any], *words: str) -> Trained:
    """The run in out_dir, which is made where it has not ended.

    Raises ConfigError for one with other options, and where another version has scored it.
    """
    if exit_reason(out_dir / "report.json") not in ENDINGS:
        return train_in(out_dir, *words)
    run = Trained.read(out_dir)
    if "recall" not in run.report:
        raise ConfigError(f"{out_dir} was scored by another version: name other --runs")
    if differing := [f"--{name}" for name, value in asked.items() if run.config["config"][name] != value]:
        raise ConfigError(f"{out_dir} holds a run with another {', '.join(differing)}: name other --runs")
    return run


def told(run: Trained) -> dict[str, Any]:
    """How a run stood at its end."""
    report = run.report
    kept = {key: report[key] for key in ("reached", "steps", "train_s", "launch_s", "loss")}
    recited = ("exact_recall", "recited_tokens", "recitation_breaks", "first_break_token")
    return (
        kept | {"window_recall": report["full_pass"]["exact_recall"]} | {key: report["recall"][key] for key in recited}
    )


def is_by_heart(run: dict[str, Any]) -> bool:
    """Whether all windows come back, and the text without a break."""
    return run["window_recall"] == 1 and run["recitation_breaks"] == 0


def more_steps(run: dict[str, Any]) -> float:
    """What by heart takes beyond the target loss, as a share of its steps."""
    return run["recall"]["steps"] / run["loss"]["steps"] - 1


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    shape = result["options"]
    lines = [
        f"{shape['n_layer']} layers of {shape['n_embd']} channels, {shape['subset_tokens']:,} tokens in windows of "
        f"{shape['context_length']}, {result['dtype']} on {result['device']}, torch {result['versions']['torch']}:",
        "",
        "| recipe | seed | loss verified at step | mistakes in the recital then | windows recalled then "
        "| all by heart at step | steps more | loss then |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = sorted(result["runs"], key=lambda run: RECIPES.index(run["recipe"]))
    for run in runs:
        loss, recall = run["loss"], run["recall"]
        at_least = "" if is_by_heart(recall) else "> "
        lines.append(
            f"| {run['recipe']} | {run['seed']} | {loss['steps']} | {loss['recitation_breaks']} in "
            f"{loss['recited_tokens']:,} | {loss['window_recall']:.1%} | {at_least}{recall['steps']} "
            f"| {at_least}{more_steps(run):.0%} | {recall['loss']:.4f} |"
        )
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        more = [more_steps(run) for run in runs if run["recipe"] == recipe and is_by_heart(run["recall"])]
        if len(more) > 1:
            lines += ["", f"{recipe}: by heart takes {median(more):.0%} more steps, the median of {len(more)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, RecallOptions, measure, table)
