"""Replay recorded runs: at 10 to 90 % of each, how far was the ETA from the truth?

python benchmarks/eta_backtest.py
python benchmarks/eta_backtest.py --table=benchmarks/results/eta_backtest.epyc.2026-11-28.json

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
from nanogpt.optim.recipe import resolve_recipe
from nanogpt.training.state import TrainState

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the steps that the run took
METHODS = ("ensemble", "linear", "log-linear", "log-linear, told of passes")


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
        result.append({"name": path.stem} | about | {"forecasts": list(forecasts(about, rows, options.log_every))})
    return result


def forecasts(about: dict[str, Any], rows: list[dict[str, Any]], log_every: int) -> Iterator[dict[str, Any]]:
    """What each method said at the last row within each share of the run."""
    config = resolve_recipe(TrainConfig(**about["options"]))
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
        eta = progress.eta(config, floor=about["floor"], windows_per_epoch=about["windows_per_epoch"])
        log_linear = straight_line(progress.history, config.target_loss, np.log)
        told = None
        if log_linear is not None:  # that full passes judge averaged weights, and when the next can be made
            told = max(log_linear + config.ema / (1 - config.ema), progress.schedule.wait_steps)
        said = {"ensemble": eta.steps, "low": eta.low, "high": eta.high} if isinstance(eta, Eta) else {}
        yield {
            "share": share,
            "left": about["steps"] - progress.step,
            "note": None if isinstance(eta, Eta) else eta.value,
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
        "Every run, the ensemble's predicted / true and, in brackets, the same of its interval's ends:",
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
    """A table of the methods' errors over some runs, at points where all of them answer; answers: the ensemble's."""
    lines = [
        f"{title}:",
        "",
        "| at | " + " | ".join(METHODS) + " | interval holds | answers |",
        "|---|" + "---|" * len(METHODS) + "---|---|",
    ]
    for i, share in enumerate(SHARES):
        here = [run["forecasts"][i] for run in runs]
        shared = [f for f in here if all(f.get(method) for method in METHODS)]
        cells = [ratio_and_error(shared, method) for method in METHODS]
        spans = [f for f in here if "low" in f]
        # An interval may begin at the truth, where that is the next possible pass; logarithms round it.
        held = sum(f["low"] * (1 - 1e-9) <= f["left"] <= f["high"] * (1 + 1e-9) for f in spans)
        cells += [f"{held} of {len(spans)}", f"{len(spans)} of {len(here)}"]
        lines.append(f"| {share:.0%} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def ratio_and_error(forecasts: list[dict[str, Any]], method: str) -> str:
    """The geometric mean of predicted / true, and the factor by which a forecast is typically off, up or down."""
    if not forecasts:
        return ""
    logs = [log(f[method] / f["left"]) for f in forecasts]
    return f"{exp(mean(logs)):.2f}, x {exp(mean(map(abs, logs))):.2f}"


def describe(forecast: dict[str, Any], reached: bool) -> str:
    """One forecast against the truth; in steps, where the truth is not known."""
    if forecast["note"]:
        return forecast["note"]
    steps, low, high = (forecast[key] / (forecast["left"] if reached else 1) for key in ("ensemble", "low", "high"))
    return f"{steps:.2f} ({low:.2f} to {high:.2f})" if reached else f"{steps:.0f} steps ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, BacktestOptions, measure, table)
