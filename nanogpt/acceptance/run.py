"""One acceptance: its stages one after the other, and what is on the disk after each.

acceptance = AcceptanceRun(supervisor, request, Path("acceptance"), say).run()    # where supervisor.leads
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanogpt.acceptance.child import Job, Outcome
from nanogpt.acceptance.expected import ExpectedNetwork
from nanogpt.acceptance.files import write
from nanogpt.acceptance.report import Acceptance, Failure
from nanogpt.acceptance.stages.compute import measure_compute
from nanogpt.acceptance.stages.faults import make_drills
from nanogpt.acceptance.stages.inventory import take_inventory
from nanogpt.acceptance.stages.network import measure_network
from nanogpt.acceptance.stages.numerics import golden_sha256, measure_alone, measure_engine
from nanogpt.acceptance.stages.training import measure_training
from nanogpt.acceptance.supervisor import RanksLost, Supervisor, to_blame
from nanogpt.config.errors import RunError
from nanogpt.config.fault import Fault
from nanogpt.distributed.world import World
from nanogpt.storage.provenance import provenance

# Of --minutes: what two stages measure for, and after which none begins another part. The rest is training's, and
# what it needs to score what it has reached.
COMPUTE_SHARE, NETWORK_SHARE = 0.05, 0.08
NUMERICS_UNTIL, FAULTS_UNTIL, TRAINING_UNTIL = 0.45, 0.75, 0.9
LIMIT_S = 120.0  # of a job, beside what it is to measure for
LEAST_TRAINING_S = 10.0


@dataclass(frozen=True)
class Request:
    """What the cluster is asked."""

    minutes: float
    stages: tuple[str, ...]  # of STAGES; the first is made in any case, as it tells who the ranks are
    training: str  # options of the training stage
    expected: ExpectedNetwork | None
    inject: Fault | None  # put into the numerics


class AcceptanceRun:
    """The first rank's."""

    def __init__(
        self, supervisor: Supervisor, request: Request, out_dir: Path, say: Callable[[Acceptance, str], None]
    ) -> None:
        """say: hears of each stage when it has been made. Raises RanksLost, before any is."""
        self._supervisor, self._request, self._out_dir, self._say = supervisor, request, out_dir, say
        self._began = time.monotonic()
        self._found = Acceptance(
            begun_at=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S"), minutes=request.minutes,
            stages=request.stages, hosts=supervisor.hosts(), devices=(),
            inject=str(request.inject) if request.inject else None, code=provenance(), seconds={}, checks={}, files={},
            golden_sha256=golden_sha256(), expected=request.expected,
        )  # fmt: skip

    def run(self) -> Acceptance:
        """Make all stages, or those that still can be when ranks are lost. Raises RunError where the disk is full."""
        stages = {
            "inventory": self._inventory, "compute": self._compute, "network": self._network,
            "numerics": self._numerics, "faults": self._faults, "training": self._training,
        }  # fmt: skip
        try:
            for name, make in stages.items():
                if name not in ("inventory", *self._request.stages):
                    continue
                began = time.monotonic()
                try:
                    make()
                finally:
                    self._add(seconds={**self._found.seconds, name: time.monotonic() - began})
                self._write()
                self._say(self._found, name)
            self._add(after=self._apart("inventory", "at the end", partial(_by_itself, take_inventory)))
        except RanksLost as lost:
            self._add(lost=lost.ranks)
        before = self._found.checks.get("inventory")
        self._add(is_finished=True)
        self._write()
        if self._found.checks["inventory"] != before:  # what has changed since, or who is lost
            self._say(self._found, "inventory")
        return self._found

    def _inventory(self) -> None:
        before = self._apart("inventory", "at the beginning", partial(_by_itself, take_inventory))
        if before is not None:
            self._add(before=before, devices=tuple(rank.device for rank in before))

    def _compute(self) -> None:
        work = partial(measure_compute, seconds=self._seconds(COMPUTE_SHARE))
        self._add(compute=self._apart("compute", "products and copies", partial(_by_itself, work)))

    def _network(self) -> None:
        work = partial(measure_network, seconds=self._seconds(NETWORK_SHARE), hosts=self._found.hosts)
        self._add(network=self._together("network", "collectives and links", work))

    def _numerics(self) -> None:
        fault, alone = self._request.inject, "each rank alone"
        works: dict[str, Callable[[World], Any]] = {alone: partial(measure_alone, fault=fault)}
        if len(self._found.hosts) > 1:
            works |= {name: partial(measure_engine, engine=name, fault=fault) for name in ("ddp", "sharded")}
            if find_spec("deepspeed"):
                works |= {
                    f"ZeRO {stage}": partial(measure_engine, engine="deepspeed", zero_stage=stage, fault=fault)
                    for stage in range(4)
                }
        for name, work in works.items():
            if self._is_over(NUMERICS_UNTIL):
                self._fail(Failure(stage="numerics", part=name, said="", out_of_time=True))
            else:
                measured = self._apart if name == alone else self._together
                self._add(curves=(*self._found.curves, *(measured("numerics", name, work) or ())))

    def _faults(self) -> None:
        directory = self._out_dir / "faults"
        until = self._began + FAULTS_UNTIL * self._seconds(1)
        kind = self._found.before[0].kind if self._found.before else ""
        self._add(drills=make_drills(self._supervisor, directory, self._found.hosts, kind=kind, until=until))

    def _training(self) -> None:
        left_s = self._began + TRAINING_UNTIL * self._seconds(1) - time.monotonic()
        if left_s < LEAST_TRAINING_S:
            self._fail(Failure(stage="training", part="training to the target", said="", out_of_time=True))
        else:
            directory = self._out_dir / "training"
            self._add(
                training=measure_training(self._supervisor, directory, self._request.training, minutes=left_s / 60)
            )  # fmt: skip

    def _together(self, stage: str, part: str, work: Callable[[World], Any]) -> Any:
        """What work, which all ranks do in a process group, gives on the first of them; None where it fails."""
        outcomes = self._outcomes(stage, part, Job("", work=work))
        return outcomes[0].value if outcomes else None

    def _apart(self, stage: str, part: str, work: Callable[[World], tuple[Any, ...]]) -> Any:
        """What work, which each rank does without the others, gives of them, by rank; None where it fails."""
        outcomes = self._outcomes(stage, part, Job("", work=work, apart=True))
        return tuple(figures for outcome in outcomes for figures in outcome.value) if outcomes else None

    def _outcomes(self, stage: str, part: str, job: Job) -> tuple[Outcome, ...]:
        """How job ended on each rank, by rank; none where it failed, which is noted."""
        name, limit_s = f"{stage}_{part}".replace(" ", "_"), LIMIT_S + self._seconds(NETWORK_SHARE)
        outcomes = self._supervisor.run(replace(job, name=name, limit_s=limit_s))
        if all(outcome.status == 0 for outcome in outcomes):
            return outcomes
        self._fail(_failure(stage, part, outcomes))
        return ()

    def _seconds(self, share: float) -> float:
        return 60 * self._request.minutes * share

    def _is_over(self, share: float) -> bool:
        return time.monotonic() - self._began > self._seconds(share)

    def _fail(self, failure: Failure) -> None:
        self._add(failures=(*self._found.failures, failure))

    def _add(self, **figures: Any) -> None:
        self._found = replace(self._found, **figures)

    def _write(self) -> None:
        try:
            self._found = write(self._found, self._out_dir)
        except OSError as error:
            raise RunError(f"{self._out_dir} cannot be written: {error.strerror or error}") from None


def _by_itself(work: Callable[[World], tuple[Any, ...]], world: World) -> tuple[Any, ...]:
    """work of a world in which this rank is alone."""
    return work(replace(world, rank=0, size=1))


def _failure(stage: str, part: str, outcomes: Sequence[Outcome]) -> Failure:
    """Who failed first, and what was said."""
    blamed = to_blame([outcome.status for outcome in outcomes])
    rank = next(iter(blamed), next(rank for rank, outcome in enumerate(outcomes) if outcome.status != 0))
    status, said = outcomes[rank].status, outcomes[rank].said
    how = said if status is None else f"status {status}: {said}"
    return Failure(stage=stage, part=part, said=f"rank {rank}: {how}", ranks=tuple(blamed))
