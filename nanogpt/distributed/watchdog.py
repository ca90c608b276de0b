"""Ends a run that no longer moves, and says which rank stopped, and where.

with Watchdog(world, world.meet(), timeout_s=600) as watchdog:
    phases = Phases(watchdog)
    with phases("update", step=12):         # in every rank, the same phases
        ...

A rank that hangs makes all others wait in a collective: from inside, a hang and a wait look alike. So each rank has a
thread that tells the others, through the store that brought them together, how far its main thread has come.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as NoAnswer
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread, get_ident
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from nanogpt.distributed.rendezvous import in_a_thread
from nanogpt.distributed.world import World
from nanogpt.utils.phases import PhaseListener

Answer = TypeVar("Answer")

PATIENCE_S = 600.0  # for what has no steps: building, compiling, scoring, a save to a slow disk
PERIOD_S = 1.0
STORE_TIMEOUT_S = 10.0
MOST_NAMED = 4  # ranks in the line


class Reading(NamedTuple):
    """What a rank has said of itself."""

    pulse: int  # counted by its thread each period
    moves: int  # counted at each phase
    place: str  # the phase


class Watchdog(PhaseListener):
    """One rank's thread; none where the rank is alone.

    A phase counts until the next one is entered: what comes between them is done in its place, with its patience.
    """

    def __init__(self, world: World, store: dist.Store | None, *, timeout_s: float) -> None:
        self._world, self._timeout_s = world, timeout_s
        self._main = get_ident()
        self._over = Event()
        self._pulse = self._moves = 0
        self.enter("the ranks' connecting", step=None, patient=False)
        self._thread = None
        if store is not None:
            # A connection of its own, as the main thread may be waiting in the other.
            own = store.clone()  # type: ignore[attr-defined]  # missing in torch's stub
            self._store = dist.PrefixStore("watchdog", own)
            self._store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
            self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()

    def enter(self, name: str, *, step: int | None, patient: bool) -> None:
        self._place = name if step is None else f"step {step}, {name}"
        self._limit_s = max(PATIENCE_S, self._timeout_s) if patient else self._timeout_s
        self.tick()

    def tick(self) -> None:
        self._moves += 1
        self._moved_at = time.monotonic()

    def _watch(self) -> None:
        awake_at = time.monotonic()
        try:
            while not self._over.wait(PERIOD_S):
                now = time.monotonic()
                if now - awake_at > 5 * PERIOD_S:  # the whole process slept: Ctrl-Z, a suspended machine
                    self._moved_at = now
                self._ask(self._tell)
                if now - self._moved_at > self._limit_s:
                    self._end()
                awake_at = time.monotonic()
        except (dist.DistError, NoAnswer) as error:
            if not self._over.wait(STORE_TIMEOUT_S):  # else this process itself is at its end
                reason = str(error).splitlines()[0] if str(error) else f"no answer for {STORE_TIMEOUT_S:g} s"
                self._leave(
                    f"rank {self._world.rank} at {self._place} lost the store that rank 0 or its launcher holds "
                    f"({reason}): see what rank 0 printed"
                )

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """question() of the store. Raises NoAnswer."""
        return in_a_thread(question).result(STORE_TIMEOUT_S)

    def _tell(self) -> None:
        self._pulse += 1
        frame = sys._current_frames().get(self._main)
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"
        self._store.set(self._key(self._world.rank), json.dumps([self._pulse, self._moves, f"{self._place} ({line})"]))

    def _end(self) -> None:
        before = self._ask(self._everyone)
        for _ in range(3):
            time.sleep(PERIOD_S)
            self._ask(self._tell)
        after = self._ask(self._everyone)
        if self._over.is_set() or time.monotonic() - self._moved_at < self._limit_s:
            return  # it moved after all
        is_written = dump_flight_recorder(self._world.rank)
        if self._ask(lambda: self._store.add("told", 1)) == 1:
            self._say(
                f"no progress for {self._limit_s:g} s (--comm_timeout_s), reported by rank {self._world.rank} at "
                f"{self._place}: {who_stopped(before, after)}"
            )
            if is_written:
                self._wait_for_the_others()
            os._exit(1)
        time.sleep(STORE_TIMEOUT_S)  # torchrun ends every rank as soon as one leaves: let the first one speak
        os._exit(1)

    def _wait_for_the_others(self) -> None:
        """Until each rank has come as far as this one, or may be dead: torchrun ends them as soon as one leaves."""
        give_up = time.monotonic() + STORE_TIMEOUT_S / 2
        with suppress(dist.DistError, NoAnswer):
            while self._ask(lambda: self._store.add("told", 0)) < self._world.size and time.monotonic() < give_up:
                time.sleep(0.1)

    def _everyone(self) -> list[Reading]:
        """That of each rank."""
        keys = [self._key(rank) for rank in range(self._world.size)]
        nothing = Reading(0, 0, "the beginning")  # of a rank that was never heard of; to get it would wait
        return [Reading(*json.loads(self._store.get(key))) if self._store.check([key]) else nothing for key in keys]

    @staticmethod
    def _key(rank: int) -> str:
        return f"rank_{rank}"

    def _leave(self, message: str) -> None:
        self._say(message)
        os._exit(1)  # the main thread hears nothing

    @staticmethod
    def _say(message: str) -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)


def dump_flight_recorder(rank: int) -> bool:
    """Write which collectives have begun and ended on this rank, as torch's own watchdog would when it times out.

    That one waits longer than a Watchdog, and so never does. Where the environment names a file, as slurm/train.sh
    does: FILE followed by the rank, for torch's tool (python -m torch.distributed.flight_recorder.fr_trace FOLDER).
    -> whether the environment names one.
    """
    if path := os.environ.get("TORCH_FR_DUMP_TEMP_FILE"):
        with suppress(Exception):  # whatever it is, the line that names the rank must follow
            dump = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
            Path(f"{path}{rank}").write_bytes(getattr(torch._C._distributed_c10d, dump)())
    return bool(path)


def who_stopped(before: Sequence[Reading], after: Sequence[Reading]) -> str:
    """The ranks to look at, from two readings of every rank."""
    silent = [rank for rank, (old, new) in enumerate(zip(before, after, strict=True)) if old.pulse == new.pulse]
    fewest = min(rank.moves for rank in after)
    behind = [rank for rank, reading in enumerate(after) if reading.moves == fewest]
    if silent:
        what, ranks = "does not answer, last seen at", silent
    elif len(behind) < len(after):
        what, ranks = "is behind, at", behind
    else:
        what, ranks = "is at", behind
    named = "; ".join(f"rank {rank} {what} {after[rank].place}" for rank in ranks[:MOST_NAMED])
    return named + (f"; and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else "")
