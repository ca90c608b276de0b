"""The network stage: are collectives right, how fast are they, and is a node or a link slower than its like?

    figures = measure_network(world, seconds=60.0, hosts=hosts)      # every rank calls; the same on every rank
    checks = judge_network(figures, read_expected(None))

Messages grow from 1 kB to 1 GB, or as far as memory and time allow; what was left out is in the figures. The values are
small whole numbers, so that every sum is exact and any difference a fault.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from nanogpt.acceptance.expected import ExpectedNetwork
from nanogpt.acceptance.stages.collectives import COLLECTIVES, SIZES, CollectiveFigure, Sweep, groups_of, most_bytes
from nanogpt.acceptance.stages.links import (
    BisectStep,
    Units,
    bisect,
    bus_gbps,
    grouped,
    links_by_kind,
    neighbour_links,
    replay,
    units_of,
)
from nanogpt.acceptance.verdict import SLOW, Check, PerRank
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import key
from nanogpt.utils.format import counted

BISECT_SHARE = 0.3  # of the time
LARGE_BYTES = 1_000_000  # smaller messages tell of latency rather than of bandwidth
NAMES = {
    "exact": "collectives are exact", False: "links within nodes", True: "links between nodes",
    "bisect": "slow node or link by halving", "within": "all_reduce within a node",
    "across": "all_reduce between nodes", "all": "all_reduce of all ranks", "nodes": "nodes against each other",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NetworkFigures:
    """What the network stage measured."""

    hosts: tuple[str, ...] = key("the node of each rank")
    devices: tuple[str, ...] = key("the device of each rank")
    collectives: tuple[CollectiveFigure, ...] = key("by group, collective, size and node; none where there is one rank")
    left_out: tuple[str, ...] = key("sizes that were not measured, and why")
    receive_gbps: tuple[float, ...] = key("GB/s that each rank receives from the rank before; none where there is one")
    bisect: tuple[BisectStep, ...] = key("what the search for a slow node, rank or link saw, in its order")
    seconds: float = key("that all this took")

    def largest(self, group: str, collective: str = "all_reduce") -> list[CollectiveFigure]:
        """A group's figures at the largest size that was measured, one for each node of a group within."""
        found = [f for f in self.collectives if (f.group, f.collective) == (group, collective)]
        return list({f.host: f for f in sorted(found, key=lambda f: f.bytes)}.values())

    def latency_s(self, group: str) -> float:
        """Seconds of a group's all_reduce of the smallest size, of the slowest node."""
        all_reduces = [f for f in self.collectives if (f.group, f.collective) == (group, "all_reduce")]
        smallest = min(f.bytes for f in all_reduces)
        return max(f.best_s for f in all_reduces if f.bytes == smallest)


def measure_network(world: World, *, seconds: float, hosts: Sequence[str]) -> NetworkFigures:
    """Measure all ranks together, about seconds long; hosts: the node of each rank. Every rank calls."""
    began = time.perf_counter()
    devices = tuple(world.gather(world.device_name()))
    collectives: list[CollectiveFigure] = []
    left_out: list[str] = []
    received: tuple[float, ...] = ()
    steps: tuple[BisectStep, ...] = ()
    if world.size > 1:
        received = neighbour_links(world, hosts)
        steps = bisect(world, units_of(hosts), seconds=BISECT_SHARE * seconds)
        limit_bytes = most_bytes(world)
        groups = groups_of(hosts)
        jobs = len(groups) * len(COLLECTIVES)
        for kind, sets in groups.items():
            with grouped(world, sets) as group:
                for collective in COLLECTIVES:
                    (spent_s,) = world.max(time.perf_counter() - began)
                    sweep = Sweep(world, group, sets, kind, collective, hosts)
                    collectives += sweep.measure((seconds - spent_s) / jobs, limit_bytes)
                    left_out += sweep.left_out
                    jobs -= 1
    (took_s,) = world.max(time.perf_counter() - began)
    return NetworkFigures(
        hosts=tuple(hosts), devices=devices, collectives=tuple(collectives), left_out=tuple(left_out),
        receive_gbps=received, bisect=steps, seconds=took_s,
    )  # fmt: skip


def judge_network(figures: NetworkFigures, expected: ExpectedNetwork | None) -> list[Check]:
    """What the figures say; expected: to hold bandwidths to, where it knows these machines."""
    if len(figures.hosts) == 1:
        return [Check.unknown(name, "one rank: no network") for name in NAMES.values()]
    return [
        _judge_exact(figures), *_judge_links(figures), _judge_bisect(figures), *_judge_nodes(figures),
        *_judge_expected(figures, expected),
    ]  # fmt: skip


def network_by_rank(figures: NetworkFigures) -> list[PerRank]:
    """For the heat map: what each rank receives, and the bus bandwidth of its node."""
    shown = []
    if figures.receive_gbps:
        shown.append(PerRank(name="received from the rank before, GB/s", values=figures.receive_gbps))
    if within := {f.host: f.bus_gbps for f in figures.largest("within")}:
        values = tuple(within.get(host) for host in figures.hosts)
        shown.append(PerRank(name="all_reduce within the node, bus GB/s", values=values))
    return shown


def _judge_exact(figures: NetworkFigures) -> Check:
    wrong = [f for f in figures.collectives if f.wrong_ranks]
    blamed = sorted({rank for f in wrong for rank in f.wrong_ranks})
    seen = [f"{f.collective} of {f.bytes:,} bytes, {f.host or f.group}" for f in wrong]
    if not figures.collectives:
        return Check.unknown(NAMES["exact"], "nothing was measured")
    largest = max(f.bytes for f in figures.collectives)
    found = "wrong: " + "; ".join(seen) if wrong else f"{len(figures.collectives)} right, up to {largest:,} bytes"
    return Check.of(blamed, name=NAMES["exact"], found=found, expected="sums and copies of whole numbers, bit for bit")


def _judge_links(figures: NetworkFigures) -> list[Check]:
    checks = []
    for across, (usual, slow) in links_by_kind(figures.hosts, figures.receive_gbps).items():
        links = [r for r, host in enumerate(figures.hosts) if (host != figures.hosts[r - 1]) == across]
        found = f"{counted(len(links), 'link')}, the slowest {min(figures.receive_gbps[r] for r in links):.3g} GB/s"
        named = [
            f"rank {(rank - 1) % len(figures.hosts)} to {rank} on {figures.hosts[rank]}: "
            f"{figures.receive_gbps[rank]:.3g} GB/s"
            for rank in slow
        ]
        if len(links) == 1:
            checks.append(Check.unknown(NAMES[across], f"{found}: there is no other to hold it to"))
        else:
            expected = f"{SLOW:.0%} of the median, {usual:.3g} GB/s"
            blamed = _ends_of_slow_links(figures.hosts, slow, across=across) or bool(slow)
            checks.append(Check.of(blamed, name=NAMES[across], found="; ".join(named) or found, expected=expected))
    return checks


def _ends_of_slow_links(hosts: Sequence[str], slow: Sequence[int], *, across: bool) -> list[int]:
    """The ranks whose link from the rank before and to the one after are slow; between nodes, those of such nodes.

    One slow link alone does not tell which of its ends is to blame. slow: the ranks that receive slowly.
    """
    units: Sequence[object] = hosts if across else range(len(hosts))
    to_blame = {units[rank] for rank in slow} & {units[rank - 1] for rank in slow}
    return [rank for rank in slow if units[rank] in to_blame]


def _judge_bisect(figures: NetworkFigures) -> Check:
    name, units = NAMES["bisect"], units_of(figures.hosts)
    what = "nodes" if len(set(figures.hosts)) > 1 else "ranks"
    if len(units) < 3:
        return Check.unknown(name, f"two {what}: their link has no other to hold it to")
    try:
        finding = replay(units, figures.bisect)
    except ValueError as error:
        return Check.unknown(name, str(error))

    def told(some: Units) -> str:
        ranks = [rank for unit in some for rank in unit]
        hosts = ", ".join(dict.fromkeys(figures.hosts[rank] for rank in ranks))
        return f"{hosts} ({'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))})"

    expected = f"{SLOW:.0%} of the bus bandwidth of equally many other {what} at the same time"
    slowest, fastest = (pick(step.bus_gbps for step in figures.bisect) for pick in (min, max))
    found = f"{counted(len(figures.bisect), 'measurement')}, {slowest:.3g} to {fastest:.3g} GB/s"
    if finding is None:
        return Check.of(False, name=name, found=found, expected=expected)
    blamed = [rank for unit in finding.units for rank in unit]
    text = f"between {told(finding.units)} and {told(finding.other)}" if finding.other else told(finding.units)
    # Of a link, or a larger set, nobody knows which end or which member it is.
    known = len(finding.units) == 1 and not finding.other
    return Check.of(blamed if known else True, name=name, found=f"slow: {text}; {found}", expected=expected)


def _judge_nodes(figures: NetworkFigures) -> list[Check]:
    """Each node by itself against the median of those with as many ranks; slow is what is so in each collective."""
    if len(figures.largest("within")) < 2:
        return []
    slow: set[str | None] = set(figures.hosts)
    for collective in COLLECTIVES:
        within = figures.largest("within", collective)
        if not within or (largest := max(f.bytes for f in within)) < LARGE_BYTES:
            return [Check.unknown(NAMES["nodes"], f"no large {collective} was measured")]
        gbps = {f.host: bus_gbps(collective, f.ranks, f.bytes, f.best_s) for f in within}
        usual = {n: median(gbps[f.host] for f in within if f.ranks == n) for n in {f.ranks for f in within}}
        slow &= {f.host for f in within if gbps[f.host] < SLOW * usual[f.ranks]}
    found = f"{min(gbps.values()):.3g} to {max(gbps.values()):.3g} GB/s of {collective} at {largest:,} bytes"
    found += "".join(f"; slow: {host}" for host in sorted(map(str, slow)))
    blamed = [rank for rank, host in enumerate(figures.hosts) if host in slow]
    return [Check.of(blamed, name=NAMES["nodes"], found=found, expected=f"{SLOW:.0%} of the median in each collective")]


def _judge_expected(figures: NetworkFigures, expected: ExpectedNetwork | None) -> list[Check]:
    machine = expected.fitting(devices=figures.devices, hosts=figures.hosts) if expected else None
    checks = []
    for group in groups_of(figures.hosts):
        if not (seen := figures.largest(group)):
            checks.append(Check.unknown(NAMES[group], "not measured"))
            continue
        found = (
            f"{min(f.bus_gbps for f in seen):.3g} GB/s at {max(f.bytes for f in seen):,} bytes, latency "
            f"{1e6 * figures.latency_s(group):.3g} us"
        )
        if machine is None or (least := machine.at_least_gbps(group)) is None:
            checks.append(Check.unknown(NAMES[group], f"{found}; no expectation: give --expect=FILE"))
            continue
        slow = [f for f in seen if f.bus_gbps < least]
        if slow and max(f.bytes for f in seen) < SIZES[-1]:
            why = f"{found}, less than {least:g} GB/s, but larger messages, which are faster, were not measured"
            checks.append(Check.unknown(NAMES[group], why))
            continue
        blamed = [r for f in slow if f.host for r, host in enumerate(figures.hosts) if host == f.host]
        least_told = f"{least:g} GB/s of {machine.name}: {machine.source}"
        checks.append(Check.of(blamed or bool(slow), name=NAMES[group], found=found, expected=least_told))
    return checks
