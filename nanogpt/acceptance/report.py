"""acceptance.json: all that was measured of a cluster, and what follows from it.

acceptance = Acceptance.read(Path("acceptance/acceptance.json"), of="an acceptance")
judge(acceptance) == acceptance.checks          # the verdicts are nothing but a function of the figures
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from nanogpt.acceptance.expected import ExpectedNetwork
from nanogpt.acceptance.stages.compute import RankCompute, judge_compute
from nanogpt.acceptance.stages.faults import Drills, judge_faults
from nanogpt.acceptance.stages.inventory import RankInventory, judge_inventory
from nanogpt.acceptance.stages.network import NetworkFigures, judge_network
from nanogpt.acceptance.stages.numerics import Curve, judge_numerics
from nanogpt.acceptance.stages.training import Training, judge_training
from nanogpt.acceptance.verdict import Check, Verdict, worst
from nanogpt.storage.json_file import JsonFile, key
from nanogpt.storage.provenance import Provenance

# The stages in the order in which they are made, each with what it asks.
STAGES = {
    "inventory": "are all nodes alike, and healthy by their own account?",
    "compute": "does each rank multiply rightly, as fast as the others, and as fast at the end as at the beginning?",
    "network": "do the ranks add up rightly, and as fast as they should?",
    "numerics": "does each engine, and each rank alone, train along the curve that is on record?",
    "faults": "does a run that is broken end as if nothing had happened?",
    "training": "does the model reach its verified target, and how fast?",
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a stage, or a part of it, has no figures."""

    stage: str = key("the stage")
    part: str = key("what of it")
    said: str = key("what the processes said, in one line")
    ranks: tuple[int, ...] = key("the ranks whose processes failed first; none where all hung", default=())
    out_of_time: bool = key("whether it was not begun, as --minutes were over", default=False)


@dataclass(frozen=True, kw_only=True)
class Acceptance(JsonFile):
    """What a cluster was asked, what it gave, and the verdicts."""

    begun_at: str = key("when, in UTC")
    minutes: float = key("how long it was to take, minutes")
    stages: tuple[str, ...] = key("the stages that were asked for")
    hosts: tuple[str, ...] = key("the node of each rank")
    devices: tuple[str, ...] = key("what each rank computes on")
    inject: str | None = key("the fault that was put into the numerics on purpose; null: none", default=None)
    golden_sha256: str = key("SHA-256 of the curves that the numerics were held to, in hexadecimal")
    code: Provenance | None = key("which code and versions computed", added=True, merged=True)
    seconds: Mapping[str, float] = key("how long each stage took, seconds")
    before: tuple[RankInventory, ...] | None = key("each rank's hardware and software at the beginning", default=None)
    after: tuple[RankInventory, ...] | None = key("the same at the end", default=None)
    compute: tuple[RankCompute, ...] | None = key("products and copies of each rank", default=None)
    network: NetworkFigures | None = key("collectives and links", default=None)
    expected: ExpectedNetwork | None = key("what --expect says that the network should reach", default=None)
    curves: tuple[Curve, ...] = key("each training of the fixed job", default=())
    drills: Drills | None = key("each run that was broken", default=None)
    training: Training | None = key("the model's training", default=None)
    failures: tuple[Failure, ...] = key("what has no figures, and why", default=())
    lost: tuple[int, ...] = key("ranks that stopped answering", default=())
    is_finished: bool = key("whether every stage was made, or given up", default=False)
    verdict: Verdict = key("FAIL where a check failed, PASS where all passed", default=Verdict.UNKNOWN)
    checks: Mapping[str, tuple[Check, ...]] = key("by stage")
    files: Mapping[str, str] = key("SHA-256 of each file beside this one, in hexadecimal")

    @property
    def blamed(self) -> tuple[str, ...]:
        """The nodes that a failed check names, in order of rank."""
        return tuple(dict.fromkeys(self.hosts[rank] for rank in self.blamed_ranks))

    @property
    def blamed_ranks(self) -> tuple[int, ...]:
        """The ranks that a failed check names."""
        failed = (c for checks in self.checks.values() for c in checks if c.verdict is Verdict.FAIL)
        return tuple(sorted({rank for check in failed for rank in check.ranks}))

    def judged(self) -> "Acceptance":
        """The same with the verdicts that follow from it."""
        checks = judge(self)
        return replace(self, checks=checks, verdict=worst(check for stage in checks.values() for check in stage))


def judge(acceptance: Acceptance) -> dict[str, tuple[Check, ...]]:
    """The checks of each stage, from the figures alone."""
    return {stage: tuple(_checks(stage, acceptance)) or (_not_made(stage, acceptance),) for stage in STAGES}


def _checks(stage: str, found: Acceptance) -> Iterator[Check]:
    if stage == "inventory" and found.lost:
        yield Check.of(found.lost, name="ranks that answer", found="lost during the acceptance", expected="all")
    for failure in found.failures:
        if failure.stage == stage:
            yield _failed(failure)
    if stage == "inventory" and found.before is not None:
        yield from judge_inventory(found.before, found.after or found.before)
    if stage == "compute" and found.compute is not None:
        yield from judge_compute(found.compute)
    if stage == "network" and found.network is not None:
        yield from judge_network(found.network, found.expected)
    if stage == "numerics" and found.curves:
        yield from judge_numerics(found.curves)
    if stage == "faults" and found.drills is not None:
        yield from judge_faults(found.drills, len(found.hosts))
    if stage == "training" and found.training is not None:
        yield from judge_training(found.training)


def _failed(failure: Failure) -> Check:
    if failure.out_of_time:
        return Check.unknown(failure.part, "the time was over")
    return Check(
        name=failure.part, verdict=Verdict.FAIL, found=failure.said, expected="it ends, on every rank",
        ranks=failure.ranks,
    )  # fmt: skip


def _not_made(stage: str, found: Acceptance) -> Check:
    if stage not in found.stages:
        return Check.unknown(stage, "it was not asked for")
    return Check.unknown(stage, "ranks were lost before it" if found.lost else "it was not made")
