"""Loss, throughput and where the time went, of the steps between two logged rows.

meter = Meter()
meter.add(loss_sum=5300.0, tokens=1024, seconds=1.7)
loss, tokens_per_s, step_s = meter.take()
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from statistics import median, median_low
from typing import Any

from nanogpt.utils.phases import PhaseListener


class Meter:
    """Adds up global loss sums and token counts; the mean is over tokens, so unequal steps weigh as they should."""

    def __init__(self) -> None:
        self.tokens = 0  # trained on since the start
        self._reset()

    def add(self, loss_sum: float, tokens: int, seconds: float) -> None:
        """One step: its loss sum over all ranks (nats), its tokens over all ranks, this rank's seconds in it."""
        self.tokens += tokens
        self._loss_sum += loss_sum
        self._tokens += tokens
        self._seconds.append(seconds)

    def take(self) -> tuple[float, float, float]:
        """Mean loss (nats/token), tokens/s and median step (s) since the last take, then start afresh.

        NaN where no step was added.
        """
        loss = self._loss_sum / self._tokens if self._tokens else nan
        tokens_per_s = self._tokens / sum(self._seconds) if self._seconds else nan
        step_s = median(self._seconds) if self._seconds else nan
        self._reset()
        return loss, tokens_per_s, step_s

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, as JSON."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from state_dict()."""
        vars(self).update(state)

    def _reset(self) -> None:
        self._loss_sum, self._tokens = 0.0, 0
        self._seconds: list[float] = []


SLOW = 1.2  # times the median rank's own work in a step, above which a rank is slow
ROWS = 5  # that it stays so, one after the other, before a person is told


@dataclass(frozen=True)
class Slowest:
    """The rank whose own work in a step takes longest; None: nobody can tell."""

    rank: int | None = None
    host: str | None = None
    ratio: float | None = None  # to the median rank's


class SlowRanks:
    """Which rank the others wait for, and a warning of each that stays slow.

    slow_ranks = SlowRanks(["node0", "node1"], windows=[8, 8], say=print)
    slow_ranks.observe([0.10, 0.13])    # at each row
    """

    def __init__(self, hosts: Sequence[str], *, windows: Sequence[int], say: Callable[[str], None]) -> None:
        """hosts, windows: of each rank its node, and its share of a global batch."""
        self._hosts, self._say = hosts, say
        # A rank with more windows may take as much longer; not less for fewer, as an update takes each as long.
        self._allowed = [SLOW * max(1.0, share / median_low(windows)) for share in windows]
        self._rows = [0] * len(hosts)  # that each has been slow for, up to now

    def observe(self, own_s: Sequence[float]) -> Slowest:
        """The slowest of the ranks, by each one's own work in a step, in seconds; 0 or NaN: it is not known."""
        if not all(seconds > 0 for seconds in own_s):
            return Slowest()
        usual_s = median_low(own_s)
        ratios = [seconds / usual_s for seconds in own_s]
        for rank, (ratio, allowed) in enumerate(zip(ratios, self._allowed, strict=True)):
            self._rows[rank] = self._rows[rank] + 1 if ratio > allowed else 0
        if tell := [rank for rank, rows in enumerate(self._rows) if rows == ROWS]:
            named = ", ".join(f"rank {rank} on {self._hosts[rank]} ({ratios[rank]:.2f} times)" for rank in tell)
            self._say(
                f"warning: slow for {ROWS} rows, with more than {SLOW} times the median rank's own work in a step: "
                f"{named}; the others wait"
            )
        rank = max(range(len(own_s)), key=own_s.__getitem__)
        return Slowest(rank, self._hosts[rank], ratios[rank])


SHARES = ("data", "compute", "communication", "checkpoint", "full_pass")  # of the wall clock, in metrics.jsonl
SHARE_OF = {
    "batch": "data",
    "forward and backward": "compute",
    "update": "compute",
    "weight average": "compute",
    "completing a checkpoint": "checkpoint",
    "copying for a checkpoint": "checkpoint",
    "saving": "checkpoint",
    "full pass or scores": "full_pass",
}


class PhaseClock(PhaseListener):
    """This rank's seconds in each of SHARES; what is left of the wall clock is logging and the like.

    Seconds of a phase inside another are its own, and not the outer one's too.
    """

    def __init__(self) -> None:
        self._inside: list[str | None] = []  # the share of each phase that is under way; None: of none
        self._counted_at = 0.0
        self._reset()

    def enter(self, name: str, *, step: int | None, patient: bool) -> None:
        self._count()
        self._inside.append(SHARE_OF.get(name))

    def leave(self) -> None:
        self._count()
        self._inside.pop()

    def move(self, seconds: float, *, origin: str, to: str) -> None:
        """Count seconds that are in origin's as to's."""
        self._seconds[origin] -= seconds
        self._seconds[to] += seconds

    def take(self) -> tuple[dict[str, float], float]:
        """Each share of the wall clock since the last take, and this rank's own work in a step, in seconds.

        The work is NaN when no step was counted.
        """
        wall_s = time.perf_counter() - self._since
        shares = {name: seconds / wall_s for name, seconds in self._seconds.items()}
        step_s = (self._seconds["data"] + self._seconds["compute"]) / self.steps if self.steps else nan
        self._reset()
        return shares, step_s

    def _count(self) -> None:
        """Count what has passed since the last call as the innermost phase's."""
        now = time.perf_counter()
        if self._inside and (share := self._inside[-1]):
            self._seconds[share] += now - self._counted_at
        self._counted_at = now

    def _reset(self) -> None:
        self._seconds = dict.fromkeys(SHARES, 0.0)
        self.steps = 0  # to be counted by whoever takes them, refused ones too
        self._since = self._counted_at = time.perf_counter()
