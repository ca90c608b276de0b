"""Collectives of growing size in groups of ranks: right, and how fast.

    with grouped(world, sets) as group:
        figures = Sweep(world, group, sets, "within", "all_reduce", hosts).measure(10.0, most_bytes(world))

The values are small whole numbers, so that every sum is exact and any difference a fault.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from nanogpt.acceptance.stages.links import Units, bus_gbps, nodes_of, repeat, slowest_of
from nanogpt.distributed.hardware import free_bytes
from nanogpt.distributed.world import World, all_gather, reduce_scatter
from nanogpt.storage.json_file import key

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
SIZES = (1_000, 32_000, 1_000_000, 32_000_000, 1_000_000_000)  # bytes
GROWTH = 32  # from a size to the next
IN_A_ROW_BYTES = 5_000_000  # of small messages in one repetition, in at most MOST of them
FEWEST, MOST = 3, 20  # repetitions
COPIES = 4  # of a message that a collective may need: its input and output, the comparison, what gloo copies
PATTERN = 37  # so many values, then again: blocks of one rank are told from those of the next


@dataclass(frozen=True, kw_only=True)
class CollectiveFigure:
    """One collective at one size in one group of ranks."""

    group: str = key("within (a node's ranks), across (the first rank of each node) or all")
    host: str | None = key("the node, of a group within one")
    ranks: int = key("how many ranks took part")
    collective: str = key("all_reduce, reduce_scatter or all_gather")
    bytes: int = key("of what each rank reduces, of all that is scattered, or of all that is gathered")
    repetitions: int = key("how often it was timed, each time until the slowest rank had it")
    best_s: float = key("the best of them, seconds; of the smallest size it is the latency")
    median_s: float = key("the median of them, seconds")
    bus_gbps: float = key("bus bandwidth of the median by nccl-tests' definition, GB/s")
    wrong_ranks: tuple[int, ...] = key("ranks that saw a wrong result")


def groups_of(hosts: Sequence[str]) -> dict[str, Units]:
    """The sets of ranks that are measured at the same time, by kind; without all where that is another kind's set."""
    nodes = nodes_of(hosts)
    groups: dict[str, Units] = {}
    if within := tuple(node for node in nodes if len(node) > 1):
        groups["within"] = within
    if len(nodes) > 1:
        groups["across"] = (tuple(node[0] for node in nodes),)
        if within:
            groups["all"] = (tuple(range(len(hosts))),)
    return groups


def most_bytes(world: World) -> int:
    """The largest message that every rank has memory for, where that is known."""
    free = free_bytes(world)
    sharing = world.local_size if world.device.type == "cpu" else 1
    mine = SIZES[-1] if free is None else free / sharing / COPIES
    return int(-world.max(-mine)[0])


def numel_of(size_bytes: int, ranks: int) -> int:
    """How many fp32 values a message has: at least size_bytes, in equal shares of whole 32 bytes."""
    return -(-size_bytes // (32 * ranks)) * 8 * ranks


class _Operation:
    """A collective of one size in a group: its tensors, itself, and whether its result is right."""

    def __init__(self, world: World, group: dist.ProcessGroup, collective: str, size_bytes: int) -> None:
        self._group, self._collective = group, collective
        n, self._rank = dist.get_world_size(group), dist.get_rank(group)
        numel = numel_of(size_bytes, n)
        self._values = torch.zeros(numel, device=world.device)
        self._share = torch.zeros(0 if collective == "all_reduce" else numel // n, device=world.device)
        self._ranks = n

    def run(self) -> None:
        if self._collective == "all_reduce":
            dist.all_reduce(self._values, group=self._group)
        elif self._collective == "reduce_scatter":
            reduce_scatter(self._share, self._values, group=self._group)
        else:
            all_gather(self._values, self._share, group=self._group)

    def is_right(self) -> bool:
        """Run once on numbers that tell ranks and places apart, exact in fp32 up to 26,000 ranks; zeros are left."""
        n, device = self._ranks, self._values.device
        places = (torch.arange(8 * n, device=device) % PATTERN + 1).float().view(n, 1, 8)
        factors = (torch.arange(n, device=device) % 16 + 1).float().view(n, 1, 1)
        values, share = self._values.view(n, -1, 8), self._share.view(-1, 8)
        if self._collective == "all_gather":
            share.copy_((places * factors)[self._rank].expand_as(share))
        else:
            values.copy_((places * factors[self._rank]).expand_as(values))
        self.run()
        if self._collective == "reduce_scatter":
            is_right = bool((share == places[self._rank] * factors.sum()).all())
        else:
            is_right = bool((values == places * (factors.sum() if self._collective == "all_reduce" else factors)).all())
        self._values.zero_()  # or sums of sums would grow to infinity
        self._share.zero_()
        return is_right


class Sweep:
    """One collective from the smallest size to the largest that fits, in groups at the same time."""

    def __init__(
        self, world: World, group: dist.ProcessGroup | None, sets: Units, kind: str, collective: str,
        hosts: Sequence[str],
    ) -> None:  # fmt: skip
        self._world, self._group, self._sets, self._hosts = world, group, sets, hosts
        self._kind, self._collective = kind, collective
        self.left_out: list[str] = []

    def measure(self, seconds: float, most_bytes: int) -> list[CollectiveFigure]:
        """About seconds long; every rank calls."""
        figures: list[CollectiveFigure] = []
        began, before_s, slowest_s = time.perf_counter(), 0.0, 0.0
        for index, size_bytes in enumerate(SIZES):
            (spent_s,) = self._world.max(time.perf_counter() - began)
            left_s = seconds - spent_s
            # A latency and so much a byte: the next adds at most GROWTH times what the last added.
            forecast_s = slowest_s + GROWTH * max(0.0, slowest_s - before_s) if index > 1 else slowest_s
            if size_bytes > most_bytes:
                why = "no memory for it"
            elif index and forecast_s * (FEWEST + 2) > left_s:
                why = "no time for it"
            elif (measured := self._size(size_bytes, left_s / (len(SIZES) - index))) is None:
                why = "a rank had no memory for it"
            else:
                figures += measured
                before_s, slowest_s = slowest_s, max(f.median_s for f in measured)
                continue
            self.left_out.append(f"{self._kind}: {self._collective} from {size_bytes:,} bytes on: {why}")
            break
        return figures

    def _size(self, size_bytes: int, seconds: float) -> list[CollectiveFigure] | None:
        """A figure of each set; None where a rank cannot allocate."""
        world, operation = self._world, None
        failed = 0.0
        try:
            if self._group is not None:
                operation = _Operation(world, self._group, self._collective, size_bytes)
        except RuntimeError:  # out of memory, on a CPU too
            failed = 1.0
        if world.max(failed)[0]:
            return None
        is_right = operation is None or operation.is_right()  # connects them too
        work = None if operation is None else operation.run
        in_a_row = max(1, min(MOST, IN_A_ROW_BYTES // size_bytes))
        first = repeat(world, work, repetitions=1, in_a_row=in_a_row)
        (first_s,) = world.max(*(first or (0.0,)))
        repetitions = max(FEWEST, min(MOST, int(seconds / (first_s * in_a_row))))
        told = world.gather((repeat(world, work, repetitions=repetitions, in_a_row=in_a_row), is_right))
        return [self._figure(ranks, size_bytes, *zip(*told, strict=True)) for ranks in self._sets]

    def _figure(
        self, ranks: Sequence[int], size_bytes: int, times: Sequence[Sequence[float]], is_right: Sequence[bool]
    ) -> CollectiveFigure:
        """Of the ranks of a set; times, is_right: of all ranks."""
        seconds = slowest_of(times, ranks)
        sent_bytes = 4 * numel_of(size_bytes, len(ranks))
        return CollectiveFigure(
            group=self._kind, host=self._hosts[ranks[0]] if self._kind == "within" else None, ranks=len(ranks),
            collective=self._collective, bytes=sent_bytes, repetitions=len(seconds), best_s=min(seconds),
            median_s=median(seconds), bus_gbps=bus_gbps(self._collective, len(ranks), sent_bytes, median(seconds)),
            wrong_ranks=tuple(rank for rank in ranks if not is_right[rank]),
        )  # fmt: skip
