"""Stage e: the model that the cluster is for, trained to its verified target, or as far as the time allows.

training = measure_training(supervisor, Path("acceptance/training"), "--recipe=fast", minutes=3.0)
judge_training(training)
"""

import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nanogpt.acceptance.child import Job
from nanogpt.acceptance.supervisor import Supervisor, to_blame
from nanogpt.acceptance.verdict import SLOW, Check
from nanogpt.config.cli import parse
from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.plots.run_history import read_rows
from nanogpt.storage.json_file import key
from nanogpt.storage.report import Report
from nanogpt.storage.run_dir import METRICS, REPORT

BUDGET_SPENT = 3  # the status of a run whose time was over
FINE = (0, BUDGET_SPENT)
STARTING_S, ENDING_S = 60.0, 60.0  # that a run may take beside its --max_minutes: until its first step, and to score
SILENT_S, SILENT_STEPS = 30.0, 10  # without a row, in seconds and in steps, after which a run hangs
OWN = ("out_dir", "max_minutes", "wandb", "resume", "log_every")  # options that are the stage's


@dataclass(frozen=True, kw_only=True)
class Training:
    """What came of it. A figure of steps is the median over the rows of metrics.jsonl."""

    options: str = key("the options of the run, beside where it is written")
    minutes: float = key("the --max_minutes of the run, minutes")
    statuses: tuple[int | None, ...] = key("of each rank, 0: verified, 3: its time was over; null: it was killed")
    said: str = key("the last line of the first rank that is named, or of the first of all")
    rows: int = key("rows of metrics.jsonl, one a step")
    last_row_s: float | None = key("when the newest was written, seconds of training; null: there is none")
    silent_s: float | None = key("since then when the run ended, seconds; null: there is none")
    steps: int | None = key("steps trained; null: none has ended")
    loss: float | None = key("of the newest full pass, or of the newest row where there was none, nats/token")
    target_loss: float | None = key("the target of the full pass, nats/token; null: there is no report")
    exact_recall: float | None = key("share of the random prompts that bring back the rest of their window exactly")
    train_s: float | None = key("since training began, seconds")
    step_s: float | None = key("of a step, seconds")
    tokens_per_s: float | None = key("of all ranks, tokens/s")
    mfu: float | None = key("model FLOPs utilisation; null: the devices' peak is unknown")
    communication_share: float | None = key("of the first rank's time; null: the engine cannot tell")
    slowest_rank: int | None = key("the rank that was slowest most often; null: the engine cannot tell")
    slowest_rank_rows: float | None = key("share of the rows in which it was")
    slowest_rank_ratio: float | None = key("how many times as long as the median rank its own work took in them")

    @property
    def is_verified(self) -> bool:
        """Whether the run has reached its target, on every rank."""
        return set(self.statuses) == {0}


def check_options(words: str) -> tuple[str, ...]:
    """The words of --training, checked as train_overfit.py would. Raises ConfigError."""
    try:
        found = tuple(shlex.split(words))
    except ValueError as error:
        raise ConfigError(f"--training={words}: {error}") from None
    for word in found:
        if (name := word.removeprefix("--").partition("=")[0].replace("-", "_")) in OWN:
            raise ConfigError(f"--training: --{name} is the acceptance's own: leave it out")
    parse(TrainConfig, found, program="nanogpt train", about=None)
    return found


def measure_training(supervisor: Supervisor, directory: Path, words: str, *, minutes: float) -> Training:
    """Train for so long at most. For the first rank. Raises RanksLost."""
    silent_s: float | None = None
    own: dict[str, object] = {"out_dir": directory, "max_minutes": minutes, "wandb": "disabled", "log_every": 1}
    given = check_options(words)
    if not any(word.replace("-", "_").startswith("__batch_size") for word in given):
        own["batch_size"] = max(TrainConfig().batch_size, supervisor.size)  # a window a rank at least
    command = ("train", *given, *(f"--{name}={value}" for name, value in own.items()))
    outcomes = supervisor.run(Job("training", words=command, limit_s=60 * minutes + STARTING_S + ENDING_S))
    with suppress(OSError):
        silent_s = time.time() - (directory / METRICS).stat().st_mtime
    statuses = tuple(outcome.status for outcome in outcomes)
    said = outcomes[next(iter(to_blame(statuses, fine=FINE)), 0)].said
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return training_of(directory, words, minutes=minutes, statuses=statuses, said=said, silent_s=silent_s)


def training_of(
    directory: Path, words: str, *, minutes: float, statuses: tuple[int | None, ...], said: str, silent_s: float | None
) -> Training:
    """What the files of a run say of it."""
    rows, report = rows_of(directory), report_of(directory)
    ranks = Counter(row["slowest_rank"] for row in rows if row["slowest_rank"] is not None)
    slowest = max(sorted(ranks), key=ranks.__getitem__, default=None)
    newest = rows[-1] if rows else {}
    return Training(
        options=words, minutes=minutes, statuses=statuses, said=said, rows=len(rows),
        last_row_s=newest.get("wall_s"), silent_s=silent_s,
        steps=report.steps if report else newest.get("step"),
        loss=report.loss if report and report.loss is not None else newest.get("loss"),
        target_loss=report.target_loss if report else None,
        exact_recall=report.recall.exact_recall if report and report.scores else None,
        train_s=report.train_s if report else newest.get("wall_s"),
        step_s=_median(row["step_s"] for row in rows), tokens_per_s=_median(row["tokens_per_s"] for row in rows),
        mfu=_median(row["mfu"] for row in rows),
        slowest_rank_rows=ranks[slowest] / ranks.total() if ranks else None,
        slowest_rank_ratio=_median(row["slowest_rank_ratio"] for row in rows if row["slowest_rank"] == slowest),
        communication_share=_median(row["time_share"]["communication"] for row in rows),
        slowest_rank=slowest,
    )  # fmt: skip


def judge_training(training: Training) -> list[Check]:
    """Whether the target was verified, and whether a rank was slow."""
    return [_judge_target(training), _judge_ranks(training)]


def _judge_target(training: Training) -> Check:
    name = f"training to the target ({training.options})"
    expected = "a full pass verifies the target loss"
    figures = ", ".join(_figures(training)) or "no step has ended"
    statuses = set(training.statuses)
    if training.is_verified:
        return Check.of(False, name=name, found=f"verified: {figures}", expected=expected)
    if blamed := to_blame(training.statuses, fine=FINE):
        how = ", ".join(f"rank {rank} ended with status {training.statuses[rank]}" for rank in blamed)
        return Check.of(blamed, name=name, found=f"{how}: {training.said}", expected=expected)
    if statuses - {None, BUDGET_SPENT}:
        return Check.of(True, name=name, found=f"not all ranks verified it: {training.said}", expected=expected)
    if None in statuses and _hung(training):
        found = f"no step ended for {training.silent_s:.0f} s, and it was killed: {figures}"
        return Check.of(True, name=name, found=found, expected=expected)
    return Check.unknown(name, f"the time was over: {figures}")


def _hung(training: Training) -> bool:
    """Whether a run that was killed had stopped in the middle of its steps, rather than scored or begun slowly."""
    if training.last_row_s is None or training.silent_s is None or training.last_row_s >= 60 * training.minutes:
        return False
    return training.silent_s > max(SILENT_S, SILENT_STEPS * (training.step_s or 0.0))


def _judge_ranks(training: Training) -> Check:
    name, rank, ratio = "ranks while training", training.slowest_rank, training.slowest_rank_ratio
    if len(training.statuses) == 1:
        return Check.unknown(name, "one rank: no other to compare with")
    if rank is None or ratio is None or training.slowest_rank_rows is None:
        return Check.unknown(name, "this engine, or a run without a step, cannot tell whose work takes longest")
    is_slow = training.slowest_rank_rows > 1 / 2 and ratio > 1 / SLOW
    return Check.of(
        [rank] if is_slow else [], name=name,
        found=f"rank {rank}, slowest in {training.slowest_rank_rows:.0%} of the rows, took {ratio:.2f} x the median "
        f"rank's time in them",
        expected=f"at most {1 / SLOW:.2f} x in most rows",
    )  # fmt: skip


def _figures(training: Training) -> Iterator[str]:
    """What is known, with units."""
    for value, text in (
        (training.loss, "loss {:.4f} nats/token"),
        (training.target_loss, "target {:g}"),
        (training.steps, "{:,} steps"),
        (training.train_s, "{:.1f} s"),
        (training.step_s, "{:.3g} s a step"),
        (training.tokens_per_s, "{:,.0f} tokens/s"),
        (training.mfu, "MFU {:.1%}"),
        (training.communication_share, "{:.0%} communication"),
        (training.exact_recall, "recall {:.1%}"),
    ):
        if value is not None:
            yield text.format(value)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, none where they cannot be read."""
    try:
        return read_rows(run / METRICS)
    except ConfigError:
        return []


def report_of(run: Path) -> Report | None:
    """A run's report; None where there is none, or it cannot be read."""
    try:
        return Report.find(run / REPORT)
    except ConfigError:
        return None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
