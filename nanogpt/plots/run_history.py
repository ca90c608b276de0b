"""What runs did, read from the files that they write, and what differs between them.

curves = [read_curve("runs/a"), read_curve("runs/b")]
name_differences(curves)        # ['learning_rate=0.0006', 'learning_rate=0.001']

A run need not have ended to be read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import read_file
from nanogpt.config.options import option_names
from nanogpt.config.train_config import TrainConfig
from nanogpt.storage.json_file import no_run, parse_json
from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.report import exit_reason
from nanogpt.storage.run_dir import CONFIG, FINISHED, METRICS, REPORT, run_directory
from nanogpt.utils.format import duration, last_names

LEAVE_THE_CURVE = option_names(TrainConfig, shapes_curve=False)


@dataclass(frozen=True)
class Curve:
    """A run as far as it has come. A figure that its row does not have, or that was not finite, is NaN."""

    name: str  # its directory, as it was given
    options: dict[str, Any]  # those that shape the curve, and what the run runs on
    steps: list[int]
    wall_s: list[float]  # in training, over all attempts
    loss: list[float]  # nats/token, mean over the steps since the row before
    full_pass_loss: list[float]  # nats/token
    text: str  # '2,048 tokens of builtin'
    target: float
    floor: float
    outcome: str  # 'target reached: step 364, 10 min'


def read_curve(run_dir: str) -> Curve:
    """The run in run_dir, maybe without any row yet. Raises ConfigError where a file is missing or damaged."""
    path = run_directory(run_dir)
    info = RunInfo.read(path / CONFIG, of=FINISHED)
    ended = exit_reason(path / REPORT)
    rows = read_rows(path / METRICS)
    if info.config is None or info.floor is None:
        raise no_run(path / CONFIG, f"it has no {'config' if info.config is None else 'floor'}")
    try:
        options: dict[str, Any] = {name: value for name, value in info.config.items() if name not in LEAVE_THE_CURVE}
        reason = "so far" if ended is None else ended.replace("_", " ")
        steps, wall_s = [int(row["step"]) for row in rows], [float(row["wall_s"]) for row in rows]
        return Curve(
            name=run_dir,
            options=options | {"ranks": info.world_size, "device": info.device},
            steps=steps,
            wall_s=wall_s,
            loss=[_or_nan(row["loss"]) for row in rows],
            full_pass_loss=[_or_nan(row["full_pass_loss"]) for row in rows],
            target=_positive(options["target_loss"]),
            text=f"{options['subset_tokens']:,} tokens of {last_names(options['data'])}",
            floor=info.floor,
            outcome=f"{reason}: step {steps[-1]:,}, {duration(wall_s[-1])}" if rows else "",
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{run_dir} holds something else than a run: {error!r}") from None


def name_differences(curves: Sequence[Curve]) -> list[str]:
    """For each run its options that another run has otherwise; where these do not tell it apart, its directory too."""
    names = dict.fromkeys(name for curve in curves for name in curve.options)
    differing = [name for name in names if any(c.options.get(name) != curves[0].options.get(name) for c in curves)]
    said = [
        ", ".join(f"{name}={_short(curve.options[name])}" for name in differing if name in curve.options)
        for curve in curves
    ]
    return [
        text if said.count(text) == 1 else f"{text} in {curve.name}".strip()
        for text, curve in zip(said, curves, strict=True)
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, but for a last one that is still being written. Raises ConfigError."""
    try:
        lines = read_file(path).decode("utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: is {path.parent} the directory of a run?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse_json(line))
        except ValueError:
            if line.endswith("\n"):
                raise ConfigError(f"{path} is damaged at line {number}") from None
    return rows


def _or_nan(figure: float | None) -> float:
    return nan if figure is None else float(figure)


def _positive(figure: float) -> float:
    if not 0 < figure < inf:
        raise ValueError(f"{figure} on a logarithmic axis")
    return float(figure)


def _short(value: Any) -> str:
    """A value for a legend: a path by its last name."""
    if isinstance(value, str):
        return last_names(value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
