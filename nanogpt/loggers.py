"""Who hears of the run: a terminal, metrics.jsonl, and nobody on the ranks that are not the first.

with open_logger(world, out_dir, target_loss=0.099) as logger:
    logger.row(row)
"""

import json
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from nanogpt.strict_json import finite


@dataclass(frozen=True)
class Row:
    """One line of metrics.jsonl, where a figure that is not finite is null.

    Every figure is global: over all ranks, and over the steps since the row before.
    """

    step: int
    tokens: int  # trained on so far
    loss: float  # mean over the tokens since the last row, each at the weights of its own step; NaN without any
    lr: float
    grad_norm: float
    tokens_per_s: float  # full passes and other pauses excluded; NaN without a step
    mfu: float | None
    eta_s: float | None
    eta_low_s: float | None
    eta_high_s: float | None
    wall_s: float  # since training began
    memory_bytes: int  # the most that any rank has held
    full_pass_loss: float | None  # on the rows where a full pass ran, else null

    def to_json(self) -> str:
        """One line of strict JSON."""
        return json.dumps(finite(asdict(self)), allow_nan=False)


class Logger(ABC):
    """Hears of a run. Everything is said to every logger, in order; close is said once."""

    @abstractmethod
    def row(self, row: Row) -> None:
        """A logged step."""

    @abstractmethod
    def say(self, text: str) -> None:
        """A sentence for a person."""

    @abstractmethod
    def close(self) -> None:
        """The run is over."""


class NullLogger(Logger):
    """Every rank but the first."""

    def row(self, row: Row) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class JsonlLogger(Logger):
    """metrics.jsonl, the truth of the run: each line is flushed before the next step begins."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def row(self, row: Row) -> None:
        self._file.write(row.to_json() + "\n")
        self._file.flush()

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class PlainLogger(Logger):
    """A line a row, for logs and pipes."""

    def row(self, row: Row) -> None:
        print(describe(row), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class RichLogger(Logger):
    """A terminal: sentences scroll by, the newest row stays at the foot beside a bar.

    The bar measures the way to the target on the logarithm of the loss, not the share of max_steps.
    """

    def __init__(self, target_loss: float) -> None:
        self._target_loss = target_loss
        self._first_loss: float | None = None
        self._bar = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=Console())
        self._task = self._bar.add_task("warming up", total=1.0)
        self._bar.start()

    def row(self, row: Row) -> None:
        if self._first_loss is None and row.loss > 0:
            self._first_loss = row.loss
        if self._first_loss is None:
            return
        way = math.log(max(self._first_loss / self._target_loss, 1.0 + 1e-9))
        gone = math.log(self._first_loss / row.loss) if row.loss > 0 else 0.0
        self._bar.update(self._task, completed=min(1.0, max(0.0, gone / way)), description=describe(row))

    def say(self, text: str) -> None:
        self._bar.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


class Loggers(Logger):
    """Several loggers as one."""

    def __init__(self, *loggers: Logger) -> None:
        self._loggers = loggers

    def row(self, row: Row) -> None:
        for logger in self._loggers:
            logger.row(row)

    def say(self, text: str) -> None:
        for logger in self._loggers:
            logger.say(text)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def open_logger(*, is_first: bool, out_dir: Path, target_loss: float) -> Logger:
    """The loggers of this rank."""
    if not is_first:
        return NullLogger()
    person = RichLogger(target_loss) if sys.stdout.isatty() else PlainLogger()
    return Loggers(person, JsonlLogger(out_dir / "metrics.jsonl"))


def describe(row: Row) -> str:
    """A row as a person reads it."""
    eta = "no ETA yet"
    if row.eta_s is not None:
        eta = f"ETA {duration(row.eta_s)} ({duration(row.eta_low_s)} to {duration(row.eta_high_s)})"
    full = "" if row.full_pass_loss is None else f"  full pass {row.full_pass_loss:.4f}"
    return f"step {row.step:5d}  loss {row.loss:.4f}  {row.tokens_per_s:,.0f} tokens/s  {eta}{full}"


def duration(seconds: float | None) -> str:
    """Seconds for a person: '45 s', '12 min', '3.2 h'."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
