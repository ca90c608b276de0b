"""Which node, rank or link is slower than its like: by halving, and by the links between neighbours.

    steps = bisect(world, nodes_of(hosts), seconds=10.0)        # every rank calls
    finding = replay(nodes_of(hosts), steps)                    # the same from the record alone

All sets that are compared have equally many nodes and are measured at the same time: NCCL has other algorithms for
two nodes than for more, with another bus bandwidth (github.com/NVIDIA/nccl-tests/issues/196), and busy processors are
as busy for both. Two slow ones in different halves hide each other here; the neighbour links are held to the median.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_high

import torch
import torch.distributed as dist

from nanogpt.acceptance.verdict import SLOW
from nanogpt.distributed.health_check import receive_from_before
from nanogpt.distributed.world import COLLECTIVE_TIMEOUT, MARGIN, World
from nanogpt.storage.json_file import key

REPETITIONS = 5  # of a measurement, of which the best counts
REPETITION_S = 0.1  # of one: longer than a scheduler's turn, and than the 0.1 s in which a control group has its quota
SOUND_STEPS = 8  # measurements, at most about, where nothing is slow
LINK_ATTEMPTS = 8  # a link's measurement is shorter
MOST_IN_A_ROW = 1000
CONFIRMED = 4  # times that something is measured before it is called slow: ranks that share cores slow each other
BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}  # of the all_reduce
Unit = tuple[int, ...]  # the ranks of a node, or one rank
Units = tuple[Unit, ...]


@dataclass(frozen=True, kw_only=True)
class BisectStep:
    """One set of ranks in one measurement; what was measured at the same time follows each other."""

    ranks: tuple[int, ...] = key("that all-reduced together")
    best_s: float = key("the best of five repetitions on their slowest rank, seconds of one all_reduce")
    bus_gbps: float = key("its bus bandwidth, GB/s")


@dataclass(frozen=True)
class Finding:
    """The units that are slow, or with other: the links between those and these."""

    units: Units
    other: Units = ()


Search = Generator[list[Units], list[float], Finding | None]


def nodes_of(hosts: Sequence[str]) -> Units:
    """The ranks of each node, in order of their first."""
    return tuple(tuple(r for r, each in enumerate(hosts) if each == host) for host in dict.fromkeys(hosts))


def units_of(hosts: Sequence[str]) -> Units:
    """What is halved: the nodes, or the ranks where there is one node."""
    nodes = nodes_of(hosts)
    return nodes if len(nodes) > 1 else tuple((rank,) for rank in range(len(hosts)))


def bus_gbps(collective: str, ranks: int, size_bytes: int, seconds: float) -> float:
    """Bus bandwidth in GB/s as NVIDIA's nccl-tests define it (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).

    size_bytes: of what each rank reduces, of all that is scattered, or of all that is gathered.
    """
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks * size_bytes / seconds / 1e9


def neighbour_links(world: World, hosts: Sequence[str]) -> tuple[float, ...]:
    """GB/s that each rank receives from the rank before; where one is slow the best of eight measurements counts."""
    received = world.gather(receive_from_before(world))
    for _ in range(LINK_ATTEMPTS - 1):
        if not any(slow for _, slow in links_by_kind(hosts, received).values()):
            break
        received = list(map(max, received, world.gather(receive_from_before(world))))
    return tuple(received)


def links_by_kind(hosts: Sequence[str], received: Sequence[float]) -> dict[bool, tuple[float, list[int]]]:
    """By whether a link is between nodes: the median in GB/s, and the ranks that receive much slower than that."""
    links = [(host != hosts[rank - 1], rank) for rank, host in enumerate(hosts)]  # rank 0 receives from the last
    found = {}
    for kind in sorted({across for across, _ in links}):
        ranks = [rank for across, rank in links if across == kind]
        usual = median_high(received[rank] for rank in ranks)  # of two the faster
        found[kind] = usual, [rank for rank in ranks if received[rank] < SLOW * usual]
    return found


@contextmanager
def grouped(world: World, sets: Sequence[Sequence[int]]) -> Iterator[dist.ProcessGroup | None]:
    """The process group of this rank's set, None where it is in none; the sets share no rank. Every rank calls."""
    mine = None
    for ranks in sets:  # every rank makes every group, in this order, as new_group wants it
        group = dist.new_group(sorted(ranks), timeout=COLLECTIVE_TIMEOUT + MARGIN)
        if world.rank in ranks:
            mine = group
    yield mine
    world.max(0.0)  # nobody leaves while another is at work in it
    if mine is not None:
        dist.destroy_process_group(mine)


def repeat(world: World, work: Callable[[], object] | None, *, repetitions: int, in_a_row: int) -> tuple[float, ...]:
    """Seconds that work took in each repetition, on average of in_a_row times; none for a rank without work.

    All ranks begin each repetition together. Several times in a row, or how far apart the ranks begin would be counted.
    """
    times = []
    for _ in range(repetitions):
        world.max(0.0)
        if work is not None:
            times.append(_seconds_of_row(world, work, in_a_row))
    return tuple(times)


def slowest_of(times: Sequence[Sequence[float]], ranks: Sequence[int]) -> list[float]:
    """By repetition, what the slowest of the ranks took; times: by rank."""
    return [max(each) for each in zip(*(times[rank] for rank in ranks), strict=True)]


def bisect(world: World, units: Units, *, seconds: float) -> tuple[BisectStep, ...]:
    """What was seen in the search for a slow unit or link, on every rank; seconds: where nothing is slow, else more."""
    repetition_s = min(REPETITION_S, seconds / SOUND_STEPS / (REPETITIONS + 1))
    steps: list[BisectStep] = []
    search = find_slow(units)
    try:
        sets = next(search)
        while True:
            measured = _measure(world, sets, repetition_s)
            steps += measured
            sets = search.send([step.bus_gbps for step in measured])
    except StopIteration:
        return tuple(steps)


def replay(units: Units, steps: Sequence[BisectStep]) -> Finding | None:
    """What the search finds with what was seen. Raises ValueError where the steps are not those of such a search."""
    search, rest = find_slow(units), list(steps)
    try:
        sets = next(search)
        while True:
            seen, rest = rest[: len(sets)], rest[len(sets) :]
            if [step.ranks for step in seen] != [_ranks(each) for each in sets]:
                raise ValueError("the steps are not those of a search")
            sets = search.send([step.bus_gbps for step in seen])
    except StopIteration as end:
        if rest:
            raise ValueError("there are steps after the end of the search") from None
        found: Finding | None = end.value
        return found


def find_slow(units: Units) -> Search:
    """Asks for the bus bandwidth of sets of units, all of a list at the same time -> what is slow."""
    suspects = units
    good: Units = ()
    while len(suspects) >= 4:
        half = len(suspects) // 2
        halves = suspects[:half], suspects[half : 2 * half]
        if (slower := (yield from _slower(*halves))) is None:
            return (yield from _alike(*halves, odd=suspects[2 * half :], is_slow=bool(good)))
        suspects, good = halves[slower], halves[1 - slower]
    if len(suspects) == 2 and not good:
        return None  # two have no like
    found = yield from _three((*suspects, *good)[:3])
    if len(suspects) == 2 and (found is None or good[0] in found.units + found.other):
        return Finding(suspects)  # slow together, and no pair with a good one tells which
    return found


def _best(sets: list[list[Units]], slow: Callable[[list[float]], object]) -> Generator[list[Units], list[float], bool]:
    """Whether the best bandwidths of sets are slow, after each of so many measurements of all.

    sets: what is measured at the same time, and then, and then. Only the best counts, so a busy moment spoils neither
    side of a comparison, and what is sound is left as soon as it has been seen to be.
    """
    best: list[float] = []
    for _ in range(CONFIRMED):
        seen = []
        for each in sets:
            seen += yield each
        best = list(map(max, best or seen, seen))
        if not slow(best):
            return False
    return True


def _slower(one: Units, other: Units) -> Generator[list[Units], list[float], int | None]:
    """Which is slower, 0 or 1, where one is."""
    which: list[int] = []

    def slow(gbps: list[float]) -> bool:
        which[:] = [i for i in range(2) if gbps[i] < SLOW * gbps[1 - i]]
        return bool(which)

    return which[0] if (yield from _best([[one, other]], slow)) else None


def _alike(one: Units, other: Units, *, odd: Units, is_slow: bool) -> Search:
    """Where neither half is slower: the unit that was in neither, then the links between them.

    is_slow: their union is known to be.
    """
    if odd and (yield from _slower(one[1:] + odd, other)) == 0:
        with_other = yield from _slower(other[1:] + odd, one)
        return Finding(odd) if with_other == 0 else Finding(odd, one[1:])
    split = len(one) // 2
    crossings = [(one[:split], other[split:], one[split:], other[:split])]
    if len(one) == 2:  # with the halves the three ways to pair four units: each link is in one
        crossings.append((one[:1], other[:1], one[1:], other[1:]))
    for a, b, c, d in crossings:
        slower = yield from _slower(a + b, c + d)
        if slower is not None:
            return Finding(*((a, b), (c, d))[slower])
        sets = [[a + b, c + d], [one, other]]
        if (yield from _best(sets, lambda gbps: max(gbps[:2]) < SLOW * min(gbps[2:]))):
            return Finding(one, other)
    return Finding(one + other) if is_slow else None


def _three(units: Units) -> Search:
    """Each pair of three by itself. Two slow pairs have a slow unit in common, one has a slow link."""
    pairs = [(units[0], units[1]), (units[1], units[2]), (units[0], units[2])]
    slow: list[Units] = []

    def some_are(gbps: list[float]) -> bool:
        slow[:] = [pair for pair, each in zip(pairs, gbps, strict=True) if each < SLOW * max(gbps)]
        return bool(slow)

    if not (yield from _best([[pair] for pair in pairs], some_are)):
        return None
    if len(slow) == 1:
        return Finding(slow[0][:1], slow[0][1:])
    return Finding(tuple(set(slow[0]) & set(slow[1])))


def _ranks(units: Units) -> tuple[int, ...]:
    return tuple(sorted(rank for unit in units for rank in unit))


def _measure(world: World, sets: list[Units], repetition_s: float) -> list[BisectStep]:
    members = [_ranks(each) for each in sets]
    values = torch.zeros(BYTES[world.device.type] // 4, device=world.device)
    with grouped(world, members) as group:
        work = None if group is None else lambda: dist.all_reduce(values, group=group)
        repeat(world, work, repetitions=1, in_a_row=1)  # connects them
        first = repeat(world, work, repetitions=1, in_a_row=2)
        (slowest_s,) = world.max(*(first or (0.0,)))
        in_a_row = max(1, min(MOST_IN_A_ROW, int(repetition_s / slowest_s)))
        times = world.gather(repeat(world, work, repetitions=REPETITIONS, in_a_row=in_a_row))
    best_s = [min(slowest_of(times, ranks)) for ranks in members]
    return [
        BisectStep(ranks=ranks, best_s=best, bus_gbps=bus_gbps("all_reduce", len(ranks), values.nbytes, best))
        for ranks, best in zip(members, best_s, strict=True)
    ]


def _seconds_of_row(world: World, work: Callable[[], object], in_a_row: int) -> float:
    def row() -> None:
        for _ in range(in_a_row):
            work()

    return world.seconds_of(row) / in_a_row
