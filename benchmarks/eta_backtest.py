"""Replay recorded runs: at 10 to 90 % of each, how far was the ETA from the truth?

python benchmarks/eta_backtest.py
python benchmarks/eta_backtest.py --table=benchmarks/results/eta_backtest.epyc.2026-11-30.json

The first forecasts and writes JSON, the second prints it as the tables in docs/explanation/eta.md.
benchmarks/record_curve.py makes a curve of a run directory.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from parts.options import BenchmarkOptions, run_benchmark

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import option
from nanogpt.config.train_config import TrainConfig
from nanogpt.monitor.eta import Eta
from nanogpt.monitor.loggers import BY_REFERENCE
from nanogpt.optim.recipe import resolve_recipe
from nanogpt.plan.reference_runs import comparable_runs
from nanogpt.training.state import TrainState

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the steps that the run took
METHODS = ("forecast", "fit alone", "linear", "log-linear", "log-linear, told of passes")


@dataclass(frozen=True)
class BacktestOptions(BenchmarkOptions):
    """What to replay, or which result to print."""

    curves: str = option("benchmarks/curves", "the folder of recorded runs")
    log_every: int = option(TrainConfig.log_every, "forecast from rows of so many steps", "steps")


def measure(options: BacktestOptions, out: Path) -> list[dict[str, Any]]:
    """Every curve's forecasts."""
    result, paths = [], sorted(Path(options.curves).glob("*.jsonl"))
    if not paths:
        raise ConfigError(f"--curves={options.curves} holds no recorded run, NAME.jsonl")
    for path in paths:
        about, *rows = map(json.loads, path.read_text().splitlines())
        replayed = forecasts(path.stem, about, rows, options.log_every)
        result.append({"name": path.stem} | about | {"forecasts": list(replayed)})
    return result


def forecasts(name: str, about: dict[str, Any], rows: list[dict[str, Any]], log_every: int) -> Iterator[dict[str, Any]]:
    """What each method said at the last row within each share of the run, which is not a reference run of its own."""
    config = resolve_recipe(TrainConfig(**about["options"]))
    others = tuple(run for run in comparable_runs(config, about["floor"]) if Path(run.source).stem != name)
    logged = list(take_together(rows, log_every))
    for share in SHARES:
        progress = TrainState.of(config, judged_windows=about["judged_windows"], launched_at=0.0)
        for row in logged:
            if row["step"] > share * about["steps"]:
                break
            for step_loss in row["step_losses"]:
                progress.schedule.observe(step_loss)
            if "full_pass_loss" in row:
                progress.schedule.judged(row["full_pass_loss"])
            progress.step = row["step"]
            progress.history.append((row["step"], mean(row["step_losses"])))
        circumstances = {"floor": about["floor"], "windows_per_epoch": about["windows_per_epoch"]}
        fitted = progress.eta(config, **circumstances)
        eta = progress.eta(config, **circumstances, references=others)
        log_linear = straight_line(progress.history, config.target_loss, np.log)
        told = None
        if log_linear is not None:  # that full passes judge averaged weights, and when the next can be made
            told = max(log_linear + config.ema / (1 - config.ema), progress.schedule.wait_steps)
        said = {"forecast": eta.steps, "low": eta.low, "high": eta.high} if isinstance(eta, Eta) else {}
        if isinstance(fitted, Eta):
            said |= {"fit alone": fitted.steps, "fit alone low": fitted.low, "fit alone high": fitted.high}
        yield {
            "share": share,
            "left": about["steps"] - progress.step,
            "note": (BY_REFERENCE if eta.by_reference else None) if isinstance(eta, Eta) else eta.value,
            "linear": straight_line(progress.history, config.target_loss, lambda loss: loss),
            "log-linear": log_linear,
            "log-linear, told of passes": told,
        } | said


def take_together(rows: list[dict[str, Any]], log_every: int) -> Iterator[dict[str, Any]]:
    """The rows that the training loop logs, each with its steps' losses; of a row of several only the mean is known."""
    step, step_losses = 0, []
    for row in rows:
        step_losses += [row["loss"]] * (row["step"] - step)
        step = row["step"]
        if step % log_every == 0 or "full_pass_loss" in row:
            yield row | {"step_losses": step_losses}
            step_losses = []


def straight_line(
    history: list[tuple[int, float]], target: float, scale: Callable[[np.ndarray], np.ndarray]
) -> float | None:
    """Steps to the target on the least-squares line through the later half, on a scale of the loss; None if no fall."""
    steps, losses = np.array(history[len(history) // 2 :]).reshape(-1, 2).T
    if len(steps) < 2:
        return None
    slope, now = np.polyfit(steps - steps[-1], scale(losses), deg=1)
    return None if slope >= 0 else max(1.0, float((scale(np.array(target)) - now) / slope))


def table(result: list[dict[str, Any]]) -> str:
    """The result in Markdown: errors by share and method, then every run."""
    ended = [run for run in result if run["exit_reason"] == "target_reached"]
    held_out = [run for run in ended if run["held_out"]]
    lines = [
        *summary(f"The {len(held_out)} runs that were held out", held_out),
        *summary(f"All {len(ended)} runs that reached their target", ended),
        "Every run, predicted / true and, in brackets, the same of the interval's ends; * by reference runs:",
        "",
        "| run | steps | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |",
        "|---|---|" + "---|" * len(SHARES),
    ]
    for run in result:
        reached = run in ended
        cells = [describe(forecast, reached) for forecast in run["forecasts"]]
        mark = "" if run["held_out"] else " (design)"
        steps = f"{run['steps']}" if reached else f"{run['steps']}, not reached"
        lines.append(f"| {run['name']}{mark} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(title: str, runs: list[dict[str, Any]]) -> list[str]:
    """A table of each method's errors over some runs, at the points where it answers: so many."""
    lines = [
        f"{title}:",
        "",
        "| at | " + " | ".join(METHODS) + " | its interval holds | the fit's alone |",
        "|---|" + "---|" * (len(METHODS) + 2),
    ]
    for i, share in enumerate(SHARES):
        here = [run["forecasts"][i] for run in runs]
        cells = [ratio_and_error([f for f in here if f.get(method)], method) for method in METHODS]
        cells += [holds(here, "low", "high"), holds(here, "fit alone low", "fit alone high")]
        lines.append(f"| {share:.0%} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def holds(forecasts: list[dict[str, Any]], low: str, high: str) -> str:
    """How often the truth is in the interval; that may begin at it, the next possible pass, and logarithms round it."""
    answers = [f for f in forecasts if low in f]
    held = sum(f[low] * (1 - 1e-9) <= f["left"] <= f[high] * (1 + 1e-9) for f in answers)
    return f"{held} of {len(answers)}"


def ratio_and_error(forecasts: list[dict[str, Any]], method: str) -> str:
    """The geometric mean of predicted / true, and the factor by which a forecast is typically off, up or down."""
    if not forecasts:
        return ""
    logs = [log(f[method] / f["left"]) for f in forecasts]
    return f"{exp(mean(logs)):.2f}, x {exp(mean(map(abs, logs))):.2f} ({len(forecasts)})"


def describe(forecast: dict[str, Any], reached: bool) -> str:
    """One forecast against the truth; in steps, where the truth is not known."""
    if "forecast" not in forecast:
        return forecast["note"]
    steps, low, high = (forecast[key] / (forecast["left"] if reached else 1) for key in ("forecast", "low", "high"))
    mark = " *" if forecast["note"] == BY_REFERENCE else ""
    if not reached:
        return f"{steps:.0f} steps ({low:.0f} to {high:.0f}){mark}"
    return f"{steps:.2f} ({low:.2f} to {high:.2f}){mark}"


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, BacktestOptions, measure, table)
