"""Stage f: a small run is broken on purpose, and the same command must end as if nothing had happened.

drills = make_drills(supervisor, Path("acceptance/faults"), hosts, until=time.monotonic() + 60)
judge_faults(drills, ranks=8)

Bit for bit, in fp32: the loss and the gradient norm of each step, and the weights. A run that is compared was not
disturbed, and a second one shows that this cluster computes the same twice.
"""

import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt.acceptance.child import Job, Outcome
from nanogpt.acceptance.stages.training import report_of, rows_of
from nanogpt.acceptance.supervisor import Supervisor, Watch
from nanogpt.acceptance.verdict import Check
from nanogpt.config.errors import ConfigError
from nanogpt.config.fault import ALLOWED
from nanogpt.storage.json_file import key
from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.run_dir import CONFIG

STEPS, SAVED_EVERY, STEP = 8, 2, 5  # of the run; the last: the one that is broken
LIMIT_S = 90.0  # of an attempt
SILENCE_S = 10.0  # after which a run gives a frozen rank up
ENDED, SAVED, FAILED = 3, 4, 1  # statuses: of a run that has made all its steps, that was asked to stop, any other
UNDISTURBED = "undisturbed"
# So wide that its weights, 10 MB, find no room on the disk that is full (ROOM_BYTES of distributed/faults.py).
RUN = {
    "n_layer": 2, "n_head": 2, "n_embd": 48, "context_length": 16, "block_size": 16, "subset_tokens": 128,
    "dtype": "fp32", "compile": "false", "max_steps": STEPS, "checkpoint_every": SAVED_EVERY, "log_every": 1,
    "target_loss": 1e-6, "wandb": "disabled",
}  # fmt: skip
# The second: no CUDA graph, which some faults forbid: every attempt is to compute alike.
ENVIRON = {ALLOWED: "1", "CUDA_LAUNCH_BLOCKING": "1"}


@dataclass(frozen=True)
class FaultKind:
    """One way to break the run."""

    name: str
    folder: str
    inject: str = ""  # the kind of --inject, in step STEP
    of_last: bool = True  # the last rank, which is on another node than the first where there are several
    options: tuple[str, ...] = ()
    status: int = FAILED  # of the rank that it happens to, where it came as it should
    says: str = ""  # and what one of the last lines of a rank has in it then
    needs_others: bool = False  # whether somebody must be there who notices


AGAIN = FaultKind("none, once more", "again", status=ENDED)
STOP = FaultKind("SIGTERM for one rank", "stop", "slow", status=SAVED, says="saved")  # slow, or it were over before
NODE = FaultKind("SIGKILL of the first node's ranks", "node", "kill", of_last=False, status=-signal.SIGKILL)
FROZEN = FaultKind(
    "SIGSTOP of a rank", "frozen", "freeze", options=(f"--comm_timeout_s={SILENCE_S:g}",), says="does not answer",
    needs_others=True,
)  # fmt: skip
FAULTS = (
    AGAIN,
    FaultKind("SIGKILL of a rank", "kill", "kill", status=-signal.SIGKILL),
    STOP,
    FaultKind("NaN in a rank's gradient", "nan", "nan", options=("--max_bad_steps=1",), says="non-finite"),
    NODE,
    FaultKind("full disk of the first rank", "full_disk", "full_disk", of_last=False, says="cannot be written"),
    FROZEN,
)


@dataclass(frozen=True, kw_only=True)
class Drill:
    """What came of one of them."""

    fault: str = key("what was done to the run")
    rank: int = key("the rank that it was done to")
    folder: str = key("the run directory, within faults/")
    statuses: tuple[int | None, ...] = key("of each rank then; negative: the signal that ended it; null: it was killed")
    said: str = key("the line by which the fault is known, of any rank, or the first rank's last one")
    resumed_from: str | None = key("the checkpoint that the same command went on from; null: it began anew")
    resumed_status: int | None = key("of the first rank then, 3: it made all its steps; null: it was killed")
    resumed_said: str = key("the last line that it printed then")
    steps: int = key("steps that have a loss and a norm at the end")
    first_difference: int | None = key("the first step whose loss or norm is not the undisturbed run's; null: none")
    weights_sha256: str | None = key("SHA-256 of the weights at the end, in hexadecimal; null: there are none")


@dataclass(frozen=True, kw_only=True)
class Drills:
    """All of them, and what they are held to."""

    kind: str = key("what it ran on: cpu, cuda or mps")
    status: int | None = key("of the undisturbed run, 3: it made all its steps; null: it was killed")
    steps: int = key("steps of it that have a loss and a norm")
    said: str = key("the last line that its first rank printed")
    weights_sha256: str | None = key("SHA-256 of its weights, in hexadecimal; null: there are none")
    drills: tuple[Drill, ...] = key("in the order in which they were made", default=())


class _Ground:
    """Where they are made."""

    def __init__(self, supervisor: Supervisor, directory: Path, hosts: Sequence[str]) -> None:
        self._supervisor, self._directory, self._hosts = supervisor, directory, hosts

    def undisturbed(self, kind: str) -> Drills:
        outcomes = self._attempt(UNDISTURBED)
        return Drills(
            kind=kind, status=outcomes[0].status, said=outcomes[0].said,
            steps=len(losses_of(self._directory / UNDISTURBED)),
            weights_sha256=weights_of(self._directory / UNDISTURBED),
        )  # fmt: skip

    def drill(self, fault: FaultKind) -> Drill:
        """Break the run, and give the same command again."""
        rank = len(self._hosts) - 1 if fault.of_last else 0
        step = 2 if fault is STOP else STEP
        broken = f"--inject={fault.inject}:rank={rank},step={step}" if fault.inject else ""
        first = self._attempt(fault.folder, *fault.options, *filter(None, [broken]), watch=self._watch(fault, rank))
        again = first if fault is AGAIN else self._attempt(fault.folder, *fault.options)
        run = self._directory / fault.folder
        losses, right = losses_of(run), losses_of(self._directory / UNDISTURBED)
        lines = [line.strip() for outcome in first for line in outcome.tail.splitlines()]
        said = next((line for line in lines if fault.says and fault.says in line), first[0].said)
        return Drill(
            fault=fault.name, rank=rank, folder=fault.folder, statuses=tuple(outcome.status for outcome in first),
            said=said, resumed_from=_resumed_from(run), resumed_status=again[0].status,
            resumed_said=again[0].said, steps=len(losses),
            first_difference=first_difference(losses, right), weights_sha256=weights_of(run),
        )  # fmt: skip

    def _attempt(self, folder: str, *words: str, watch: Watch = lambda ended: {}) -> tuple[Outcome, ...]:
        options = RUN | {"out_dir": self._directory / folder, "batch_size": _batch_size(len(self._hosts))}
        command = ("train", *(f"--{name}={value}" for name, value in options.items()), *words)
        return self._supervisor.run(Job(folder, words=command, environ=ENVIRON, limit_s=LIMIT_S), watch)

    def _watch(self, fault: FaultKind, rank: int) -> Watch:
        """What is done to the run from outside."""

        def nothing(ended: Mapping[int, Outcome]) -> dict[int, signal.Signals]:
            return {}

        def kill_node(ended: Mapping[int, Outcome]) -> dict[int, signal.Signals]:
            like = [other for other, host in enumerate(self._hosts) if host == self._hosts[rank] and other != rank]
            return dict.fromkeys(like, signal.SIGKILL) if rank in ended else {}

        asked: list[int] = []

        def stop(ended: Mapping[int, Outcome]) -> dict[int, signal.Signals]:
            if asked or not rows_of(self._directory / fault.folder):
                return {}
            asked.append(rank)
            return {rank: signal.SIGTERM}

        return kill_node if fault is NODE else stop if fault is STOP else nothing


def make_drills(supervisor: Supervisor, directory: Path, hosts: Sequence[str], *, kind: str, until: float) -> Drills:
    """The undisturbed run, and each fault, as long as time.monotonic() is before until. For the first rank.

    kind: of the devices, cpu, cuda or mps.
    """
    ground = _Ground(supervisor, directory, hosts)
    found = ground.undisturbed(kind)
    for fault in FAULTS:
        if found.status == ENDED and time.monotonic() < until and (len(hosts) > 1 or not fault.needs_others):
            found = replace(found, drills=(*found.drills, ground.drill(fault)))
    for large in directory.glob("*/checkpoints"):
        shutil.rmtree(large, ignore_errors=True)
    return found


def judge_faults(drills: Drills, ranks: int) -> list[Check]:
    """A check for each fault. ranks: how many there are."""
    if drills.status != ENDED or drills.steps != STEPS or drills.weights_sha256 is None:
        how = "was killed" if drills.status is None else f"ended with status {drills.status}"
        found = f"it {how}, with {drills.steps} of {STEPS} steps: {drills.said}"
        return [Check.of(True, name="the undisturbed run", found=found, expected=f"status {ENDED}")]
    made = {drill.fault: drill for drill in drills.drills}
    return [_judge(fault, made.get(fault.name), drills, ranks) for fault in FAULTS]


def _judge(fault: FaultKind, drill: Drill | None, drills: Drills, ranks: int) -> Check:
    if drill is None:
        lonely = fault.needs_others and ranks == 1
        return Check.unknown(fault.name, "one rank: nobody is there to notice" if lonely else "the time was over")
    wrong, unlike = [], ""
    if not came(fault, drill):
        wrong.append(f"ended with statuses {', '.join(map(_status, drill.statuses))}: {drill.said}")
    if drill.resumed_status != ENDED:
        wrong.append(f"the same command then ended with {_status(drill.resumed_status)}: {drill.resumed_said}")
    elif drill.resumed_from is None and fault is not AGAIN:
        wrong.append("the same command then began anew: nothing was saved")
    elif drill.steps != STEPS:
        wrong.append(f"{drill.steps} of {STEPS} steps have figures")
    elif drill.first_difference is not None:
        unlike = f"step {drill.first_difference} differs from the undisturbed run's"
    elif drill.weights_sha256 != drills.weights_sha256:
        unlike = "the weights differ from the undisturbed run's"
    if unlike and not wrong and drills.kind != "cpu" and not _is_repeatable(drills):
        return Check.unknown(fault.name, f"{unlike}, and so does a run without a fault: this device sums in any order")
    wrong += filter(None, [unlike])
    return Check.of(
        bool(wrong), name=fault.name, found="; ".join(wrong) or "recovered, bit for bit",
        expected="every loss, norm and weight of the undisturbed run",
    )  # fmt: skip


def _is_repeatable(drills: Drills) -> bool:
    """Whether the undisturbed run, made once more, was the same to the last bit."""
    again = next((drill for drill in drills.drills if drill.fault == AGAIN.name), None)
    return again is not None and (again.first_difference, again.weights_sha256) == (None, drills.weights_sha256)


def came(fault: FaultKind, drill: Drill) -> bool:
    """Whether the run ended as the fault should end it: nothing is shown by one that did not happen."""
    # One that is frozen hears no signal but SIGKILL; another says that it does not answer.
    rank = 0 if fault is FROZEN else drill.rank
    return drill.statuses[rank] == fault.status and fault.says in drill.said


def losses_of(run: Path) -> dict[int, tuple[object, object]]:
    """(loss, gradient norm) of each step of a run, as metrics.jsonl has them."""
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows_of(run)}


def first_difference(rows: Mapping[int, object], right: Mapping[int, object]) -> int | None:
    """The first step of which the two say unlike things, or one nothing."""
    return next((step for step in sorted({*rows, *right}) if rows.get(step) != right.get(step)), None)


def weights_of(run: Path) -> str | None:
    """SHA-256 of a run's weights by its report."""
    report = report_of(run)
    return report.weights_sha256 if report else None


def _resumed_from(run: Path) -> str | None:
    """The checkpoint that a run's newest attempt went on from, by its name."""
    try:
        info = RunInfo.find(run / CONFIG)
    except ConfigError:
        return None
    return Path(info.resumed_from).name if info and info.resumed_from else None


def _batch_size(ranks: int) -> int:
    """A window for each rank at least."""
    return max(16, ranks)


def _status(status: int | None) -> str:
    return "none (it was killed)" if status is None else str(status)
