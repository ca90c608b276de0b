"""Who hears of the run: a terminal, metrics.jsonl, and nobody on the ranks that are not the first.

logger = Loggers(PlainLogger(), JsonlLogger(out_dir / "metrics.jsonl", print))
logger.row(row)
"""

import errno
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from nanogpt.storage.json_file import finite, key
from nanogpt.storage.report import Report
from nanogpt.utils.console import say
from nanogpt.utils.format import duration, percent

BY_REFERENCE = "by reference runs"  # in the eta_note of an ETA that is read off them
TO_THE_LOSS = "to the target loss"  # in that of a run with a target_recall


@dataclass(frozen=True)
class Row:
    """One line of metrics.jsonl, where a figure that is not finite is null.

    Every figure is global: over all ranks, and over the steps since the row before.
    """

    step: int = key("the newest step, counted from 1")
    tokens: int = key("trained on so far, tokens")
    loss: float = key("mean over the tokens of these steps, each at the weights of its own step, nats/token")
    lr: float = key("learning rate of the newest step")
    grad_norm: float = key("of the newest step, over all parameters, before the update")
    tokens_per_s: float = key("throughput of all ranks; full passes, saves and logging excluded, tokens/s")
    step_s: float = key("median duration of a step; full passes, saves and logging excluded, seconds")
    mfu: float | None = key("model FLOPs utilisation, tokens_per_s x FLOP a token / peak; null: the peak is unknown")
    eta_s: float | None = key(
        "until the target is verified, without the full passes and saves until then, seconds; 0: it is verified. Of a "
        "run with a target_recall: until the loss is there"
    )
    eta_low_s: float | None = key("low end of the interval that should hold the truth 4 times in 5, seconds")
    eta_high_s: float | None = key("its high end, seconds")
    eta_note: str | None = key(
        "why there is no ETA, or what it is of: to the target loss, by reference runs; null: of the run, by its losses"
    )
    wall_s: float = key("since training began, over all attempts, everything included, seconds")
    memory_bytes: int = key("the most that any rank has held: allocated on a GPU, resident on a CPU, bytes")
    full_pass_loss: float | None = key("mean loss over the whole subset, where a full pass ran, nats/token")
    full_pass_recall: float | None = key(
        "share of its windows that come back exactly, of a run with a target_recall; where that is reached, on any "
        "machine"
    )
    fastest_rank_step_s: float | None = key(
        "the fastest rank's own work in a step, without waiting for others, seconds; null: the engine does not know it"
    )
    slowest_rank_step_s: float | None = key("the same of the slowest rank, seconds")
    slowest_rank: int | None = key(
        "the rank whose own work takes longest, or the forward where no more is known; null: that neither"
    )
    slowest_rank_host: str | None = key("the node that it is on")
    slowest_rank_ratio: float | None = key("how many times as long as the median rank's its own work takes")
    time_share: dict[str, float | None] = key(
        "of the first rank's wall clock: data, compute, communication, checkpoint, full_pass; the rest: logging, checks"
    )

    def to_json(self) -> str:
        """One line of strict JSON."""
        return json.dumps(finite(asdict(self)), allow_nan=False)


@dataclass(frozen=True)
class Recitation:
    """The beginning of the text from the model's own mouth."""

    prompt: str
    recited: str  # what the model went on with
    verdict: str  # where it differs from the text, if it does


class Logger(ABC):
    """Hears of a run. Everything is said to every logger, in order; close is said once."""

    @abstractmethod
    def row(self, row: Row) -> None:
        """A logged step."""

    @abstractmethod
    def say(self, text: str) -> None:
        """A sentence for a person."""

    def result(self, report: Report, recitation: Recitation | None) -> None:  # noqa: B027
        """How the run ended; the files of the run directory are written."""

    def died(self, error: BaseException) -> None:  # noqa: B027
        """The run ends by an error instead."""

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
    """metrics.jsonl, the truth of the run: each line is in the file before the next step begins.

    While the disk is full the lines wait in memory, and follow whole and in order as soon as there is room.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)  # of the last whole line
        self._waiting = b""
        self._warn = warn

    def row(self, row: Row) -> None:
        had_room = not self._waiting
        self._waiting += row.to_json().encode() + b"\n"
        try:
            if self._file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._end, self._waiting = self._end + len(self._waiting), b""
        except OSError as error:
            self._file.truncate(self._end)
            if had_room:
                self._warn(f"warning: {self._file.name} cannot be written ({error.strerror}); its rows wait, going on")

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class PlainLogger(Logger):
    """A line a row, for logs and pipes."""

    def row(self, row: Row) -> None:
        say(describe(row))

    def say(self, text: str) -> None:
        say(text)

    def close(self) -> None:
        pass


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

    def result(self, report: Report, recitation: Recitation | None) -> None:
        for logger in self._loggers:
            logger.result(report, recitation)

    def died(self, error: BaseException) -> None:
        for logger in self._loggers:
            logger.died(error)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def describe(row: Row) -> str:
    """A row as a person reads it."""
    mfu = "" if row.mfu is None or math.isnan(row.mfu) else f"  MFU {row.mfu:.0%}"
    eta = f"  {told}" if (told := describe_eta(row)) else ""
    full = f"  {told}" if (told := describe_full_pass(row)) else ""
    return f"step {row.step:5d}  loss {row.loss:.4f}  {row.tokens_per_s:,.0f} tokens/s{mfu}{eta}{full}"


def describe_full_pass(row: Row) -> str:
    """What a full pass found; '' where none was made."""
    if row.full_pass_loss is None:
        return ""
    recall = "" if row.full_pass_recall is None else f", recall {percent(row.full_pass_recall)}"
    return f"full pass {row.full_pass_loss:.4f}{recall}"


def describe_eta(row: Row) -> str:
    """When the target will be reached, with the interval, or that nobody can tell; '' where it is reached."""
    if row.eta_s == 0:
        return ""
    if row.eta_s is None:
        return row.eta_note or "no ETA yet"
    if math.isnan(row.eta_s):  # a row without a step has no step time
        return "no ETA yet"
    note = f", {row.eta_note}" if row.eta_note else ""
    return f"ETA {duration(row.eta_s)} ({duration(row.eta_low_s)} to {duration(row.eta_high_s)}{note})"
