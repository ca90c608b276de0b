"""The ranks of an acceptance: each starts a process for each job, so that what breaks a job does not break them.

supervisor = Supervisor(world, store, logs=Path("acceptance/logs"))
if supervisor.leads:
    outcomes = supervisor.run(Job("numerics", work=partial(measure_engine, engine="ddp")))
    supervisor.dismiss(status=0)
else:
    status = supervisor.serve()       # every other rank does what the first one orders, until it is dismissed

They hold no GPU and make no collective: they speak through the store in which they have met. A rank whose node has died
is one that falls silent.
"""

import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as NoAnswer  # Python 3.11's own is another one
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist

from nanogpt.acceptance.child import Child, Job, Outcome
from nanogpt.config.errors import RunError, one_line
from nanogpt.distributed.rendezvous import in_a_thread
from nanogpt.distributed.world import World

Watch = Callable[[Mapping[int, Outcome]], Mapping[int, signal.Signals]]

POLL_S = 0.1
SILENT_S = 20.0  # without a sign of life, after which a rank is lost
# That the others may still take once a process has ended: of its own accord, or by a signal, after which torchrun ends
# them at once.
GRACE_S, GRACE_AFTER_SIGNAL_S = 15.0, 1.0
UNKILLABLE_S = 30.0  # in which a process that was killed must be gone, or its rank is lost


class RanksLost(Exception):  # noqa: N818, what happens to a cluster is no error of the program
    """Ranks do not answer any more, or have a process that cannot be killed: their nodes are dead, or cut off."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} lost")
        self.ranks = tuple(ranks)


class Supervisor:
    """One rank of the acceptance."""

    def __init__(self, world: World, store: dist.Store | None, *, logs: Path) -> None:
        """store: in which all have met; None where the rank is alone."""
        self._rank, self._others, self._logs = world.rank, range(1, world.size), logs
        self._store = dist.PrefixStore("supervisor", store or dist.HashStore())
        self._orders = 0
        self._lost: set[int] = set()
        self._lives = {rank: (b"", time.monotonic()) for rank in range(world.size)}  # a sign of life of each, and when
        self._write(f"host/{self._rank}", socket.gethostname())
        self._write(f"life/{self._rank}", "0")
        Thread(target=self._beat, daemon=True).start()

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self._lives)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that gives the orders and writes the report."""
        return self._rank == 0

    def hosts(self) -> tuple[str, ...]:
        """The node of each rank. Raises RanksLost."""
        until = time.monotonic() + SILENT_S
        while len(found := self._read([f"host/{rank}" for rank in self._lives])) < len(self._lives):
            time.sleep(POLL_S)
            if time.monotonic() > until:
                raise RanksLost([rank for rank in self._lives if f"host/{rank}" not in found])
        return tuple(found[f"host/{rank}"].decode() for rank in self._lives)

    def run(self, job: Job, watch: Watch = lambda ended: {}) -> tuple[Outcome, ...]:
        """Have every rank do job -> how each process ended, by rank. For the first rank.

        watch: is given those that have ended, again and again, and names the ranks whose processes are to be sent a
        signal. Raises RanksLost.
        """
        job = replace(job, port=_free_port())
        order = self._give(job)
        ended: dict[int, Outcome] = {}
        killed: dict[int, tuple[float, str]] = {}  # when, and why, by rank
        over_at: float | None = None  # when the others are to have ended too
        with Child(job, log=self._log(job)) as child:
            while len(ended) < len(self._lives):
                time.sleep(POLL_S)
                if 0 not in ended and (outcome := child.poll()):
                    ended[0] = outcome
                ended |= self._answers(order, self._others - ended.keys())
                running = self._lives.keys() - ended.keys()
                for rank, number in watch(ended).items():
                    self._send(order, rank, number, child)
                now = time.monotonic()
                if broken := [outcome.status for outcome in ended.values() if outcome.status]:
                    grace_s = GRACE_AFTER_SIGNAL_S if min(broken) < 0 else GRACE_S
                    over_at = min(over_at or now + grace_s, now + grace_s)
                why = f"killed after {job.limit_s:.0f} s" if child.age_s > job.limit_s else ""
                if over_at is not None and now > over_at:
                    why = why or "killed, as another rank had failed"
                for rank in running if why else ():
                    killed.setdefault(rank, (now, why))
                    self._send(order, rank, signal.SIGKILL, child)
                self._require(running - {0})
                if stuck := [rank for rank in running & killed.keys() if now - killed[rank][0] > UNKILLABLE_S]:
                    self._lost |= set(stuck)
                    raise RanksLost(stuck)
        return tuple(_told(ended[rank], killed[rank][1] if rank in killed else None) for rank in sorted(ended))

    def dismiss(self, status: int) -> None:
        """Let the other ranks leave with status, and wait until they have heard it. For the first rank."""
        order, until = self._give(status), time.monotonic() + SILENT_S
        left = set(self._others) - self._lost
        while left and time.monotonic() < until:
            time.sleep(POLL_S)
            left -= self._answers(order, left).keys()

    def serve(self) -> int:
        """Do what the first rank orders -> the status to leave with. For all others.

        Raises RunError where the first rank does not answer any more.
        """
        while True:
            order = f"order/{self._orders}"
            self._orders += 1
            while not (given := self._read([order])):
                time.sleep(POLL_S)
                self._require([0])
            job = pickle.loads(given[order])
            done = job if isinstance(job, int) else self._do(job, order)
            self._write(f"{order}/ended/{self._rank}", pickle.dumps(done))
            if isinstance(done, int):
                return done

    def _do(self, job: Job, order: str) -> Outcome:
        """This rank's part of it. What all ranks give alike, the first one has too."""
        with Child(job, log=self._log(job)) as child:
            signals = 0
            while (outcome := child.poll()) is None:
                time.sleep(POLL_S)
                key = f"{order}/signal/{self._rank}/{signals}"
                if found := self._read([key]):
                    child.send(signal.Signals(int(found[key])))
                    signals += 1
                self._require([0])
            return outcome if job.apart else replace(outcome, value=None)

    def _give(self, order: Job | int) -> str:
        """Publish an order -> its key."""
        key = f"order/{self._orders}"
        self._orders += 1
        self._signals = dict.fromkeys(self._others, 0)  # sent, by rank
        self._write(key, pickle.dumps(order))
        return key

    def _send(self, order: str, rank: int, number: signal.Signals, own: Child) -> None:
        if rank == 0:
            own.send(number)
        else:
            self._write(f"{order}/signal/{rank}/{self._signals[rank]}", str(int(number)))
            self._signals[rank] += 1

    def _answers(self, order: str, ranks: Iterable[int]) -> dict[int, Any]:
        """What those of ranks that have done with an order have said."""
        names = {f"{order}/ended/{rank}": rank for rank in ranks}
        return {names[key]: pickle.loads(said) for key, said in self._read(list(names)).items()}

    def _require(self, ranks: Iterable[int]) -> None:
        """Raises RanksLost, or on another rank than the first RunError, where one of ranks has long been silent."""
        now, lost = time.monotonic(), []
        lives = self._read([f"life/{rank}" for rank in ranks])
        for rank in ranks:
            life = lives.get(f"life/{rank}", b"")
            if life != self._lives[rank][0]:
                self._lives[rank] = (life, now)
            elif now - self._lives[rank][1] > SILENT_S:
                lost.append(rank)
        self._lost |= set(lost)
        if lost and self.leads:
            raise RanksLost(lost)
        if lost:
            raise RunError(f"rank {self._rank}: rank 0 does not answer any more")

    def _beat(self) -> None:
        """Give a sign of life now and then, for as long as this process lives and reaches the store."""
        lives = 0
        while True:
            lives += 1
            self._store.set(f"life/{self._rank}", str(lives))
            time.sleep(SILENT_S / 10)

    # torch waits for ever for a store whose host has died: so each look at it has a thread and a time-out.

    def _read(self, keys: list[str]) -> dict[str, bytes]:
        """What the store has under those of keys that somebody has written."""

        def look() -> dict[str, bytes]:
            there = [key for key in keys if self._store.check([key])]
            return {key: self._store.get(key) for key in there}

        found: dict[str, bytes] = self._call(look) if keys else {}
        return found

    def _write(self, key: str, value: str | bytes) -> None:
        self._call(lambda: self._store.set(key, value))  # type: ignore[arg-type]  # torch's stub has str alone

    def _call(self, question: Callable[[], Any]) -> Any:
        try:
            return in_a_thread(question).result(timeout=SILENT_S)
        except (NoAnswer, dist.DistError) as error:
            raise RunError(f"rank {self._rank}: the store of rank 0 is lost: {one_line(error)}") from None

    def _log(self, job: Job) -> Path:
        return self._logs / f"{job.name}.rank_{self._rank}.log"


def to_blame(statuses: Sequence[int | None], *, fine: Sequence[int] = (0,)) -> list[int]:
    """The ranks that broke first: those that a signal ended, or else those that failed, where most did not.

    Where one rank has gone the others fail too, and at once: nobody knows then who was the first. statuses: of each
    rank's process, None where it was killed for another's sake. fine: statuses of those that did not fail.
    """
    by_signal = [rank for rank, status in enumerate(statuses) if status is not None and status < 0]
    failed = [rank for rank, status in enumerate(statuses) if status is not None and status not in fine]
    return by_signal or (failed if len(failed) == 1 or 2 * len(failed) <= len(statuses) else [])


def _told(outcome: Outcome, why: str | None) -> Outcome:
    """The outcome of a process that was killed as why says, unless it was quicker."""
    return replace(outcome, status=None, tail=why) if why and outcome.status == -signal.SIGKILL else outcome


def _free_port() -> int:
    """One that nobody listens on, on the first rank's machine."""
    with socket.create_server(("", 0)) as listener:
        return int(listener.getsockname()[1])
