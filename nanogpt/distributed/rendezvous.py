"""Brings the ranks of a run together, and says who is missing.

    store = meet(rank=0, size=2, timeout_s=600.0)       # in every rank, with MASTER_ADDR and MASTER_PORT

torch's own rendezvous is one long call: without a word, deaf to signals, and it names nobody. Here every wait is short.
Each rank writes a sign of life into the store again and again; the first one counts them and decides.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta
from secrets import token_hex
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from nanogpt.config.errors import ConfigError, RunError, one_line
from nanogpt.utils.console import say
from nanogpt.utils.signals import StopRequested

Answer = TypeVar("Answer")

LINE_S = 30.0  # between two lines about who is missing
POLL_S, LATER_POLL_S = 0.1, 1.0  # the latter once it has taken long
SILENCE_S = 10.0  # after which a rank that came is missing again; and before a rank speaks that is not to speak first
FIRST_S = 600.0  # that the others wait for the first rank at least: it may have to read a large checkpoint
RESOLVE_S = 10.0  # that the name of a host may stay unknown
CALL_TIMEOUT = timedelta(seconds=10)
STOP_S = 5.0  # that a rank which was asked to stop still waits, as it may be that all were: they then stop together
GRACE_S = 3.0  # in which a rank that leaves lets the others know
MOST_NAMED = 4
STOPPED = "asked to stop"


class Outcome(NamedTuple):
    """What the first rank has decided, for the processes that it has heard of."""

    tokens: list[str]  # of each rank's process; '' where none came
    why: str  # '': all came; STOPPED; else what all ranks give up with


def meet(
    *, rank: int, size: int, timeout_s: float, asked_to_stop: Callable[[], bool] = lambda: False, speaks: bool = True
) -> dist.Store:
    """A store for the processes of this attempt alone, once one of each rank has come.

    speaks: whether this rank, where it is not the first, is to say that it does not reach the first. Raises
    StopRequested when any rank was asked to stop, RunError with one line when not all came within timeout_s.
    """
    me = _First(size) if rank == 0 else _Other(rank, size)
    began = said_at = called_at = unasked_at = time.monotonic()
    call, why = in_a_thread(me.look), ""
    while not why:
        wait([call], POLL_S)
        now = time.monotonic()
        unasked_at = unasked_at if asked_to_stop() else now
        if call.done() and (outcome := call.result()):
            if not outcome.why:
                return me.shared_store()
            why = outcome.why
        elif now - unasked_at > STOP_S:
            why = STOPPED
        elif now - began > (timeout_s if me.has_met_first else max(timeout_s, FIRST_S)):
            why = f"{me.missing}: gave up after {timeout_s:g} s (--comm_timeout_s)"
        elif call.done():
            time.sleep(POLL_S if now - began < SILENCE_S else LATER_POLL_S)
            call, called_at = in_a_thread(me.look), time.monotonic()
        elif now - called_at > SILENCE_S:
            me.is_cut_off("no answer")
        if now - said_at > LINE_S and (rank == 0 or (speaks and not me.reaches_first)):
            say(f"waiting for the other ranks for {now - began:.0f} s: {me.missing}")
            said_at = now
    me.leave(why, call)
    if why == STOPPED:
        raise StopRequested
    if not speaks:
        time.sleep(SILENCE_S)  # torchrun ends every rank as soon as one leaves: let the first one speak
    raise RunError(why, rank=rank)


def in_a_thread(question: Callable[[], Answer]) -> Future[Answer]:
    """question() in a thread of its own: torch waits forever for a store whose process is stopped."""
    answer: Future[Answer] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    return answer


class _Heard:
    """Whether somebody still writes, by what was read of him."""

    value: Any = None
    _at = float("-inf")

    def lately(self, value: Any) -> bool:
        if value != self.value:
            self.value, self._at = value, time.monotonic()
        return time.monotonic() - self._at < SILENCE_S


class _Rank:
    """What the first rank and the others have in common. Its calls to the store are made one at a time."""

    reaches_first: bool
    missing: str  # who is, for a person

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.token = rank, size, token_hex(8)
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.is_cut_off("no answer")
        self._serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._store: dist.Store | None = None
        self._round = ""  # which the first rank begins each time it is started: a store may outlive its process
        self._pulse = 0
        self._leaves = ""  # why
        self._began = time.monotonic()

    def look(self) -> Outcome | None:
        """Connect if need be, give a sign of life, and read what the others have written."""
        try:
            self._store = self._store or dist.PrefixStore("nanogpt", self._connect())
            self._pulse += 1
            return self._look(self._store)
        except (OSError, dist.DistError) as error:  # it is not there yet, or not any more
            self._store = None
            self.is_cut_off(getattr(error, "strerror", None) or one_line(error))
            return None

    @property
    def has_met_first(self) -> bool:
        """Whether the first rank has given a sign of life, or is this one."""
        return self.rank == 0 or bool(self._round)

    def is_cut_off(self, reason: str) -> None:
        """What is missing is the store itself."""
        self.reaches_first = False
        self.missing = f"rank {self.rank} does not reach rank 0 at {self._host}:{self._port} ({reason})"

    def leave(self, why: str, call: Future[Outcome | None]) -> None:
        """Let the others know, if they can be reached."""
        self._leaves = why
        if wait([call], GRACE_S).done:
            wait([in_a_thread(self.look)], GRACE_S)
        if self._serves:
            time.sleep(2 * LATER_POLL_S)  # until they have read it

    def shared_store(self) -> dist.Store:
        """The part of the store that has nothing of earlier attempts in it."""
        assert self._store is not None, "look() has connected"
        return dist.PrefixStore(self._round, self._store)

    def _look(self, store: dist.Store) -> Outcome | None:
        raise NotImplementedError

    def _connect(self) -> dist.TCPStore:
        try:
            socket.getaddrinfo(self._host, self._port)
        except (OSError, UnicodeError) as error:
            if time.monotonic() - self._began < RESOLVE_S:
                raise OSError(None, str(error)) from None
            raise ConfigError(f"MASTER_ADDR={self._host} cannot be resolved: {error}") from None
        if self._serves:
            return dist.TCPStore(
                "127.0.0.1", self._port, is_master=True, timeout=CALL_TIMEOUT, wait_for_workers=False,
                master_listen_fd=_listen(self._port),
            )  # fmt: skip
        # First without torch, which writes warnings of several lines when nobody listens yet.
        socket.create_connection((self._host, self._port), CALL_TIMEOUT.total_seconds()).close()
        return dist.TCPStore(self._host, self._port, timeout=CALL_TIMEOUT, wait_for_workers=False)


class _First(_Rank):
    """Rank 0, which begins a round, counts who comes, and decides."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)
        self._heard = [_Heard() for _ in range(1, size)]

    def _look(self, store: dist.Store) -> Outcome | None:
        keys = [_key(rank) for rank in range(1, self.size)]
        if not self._round:
            self._round = token_hex(8)
            names = [f"{self._round}/{key}" for key in keys]
            store.multi_set(names, [""] * len(keys))  # type: ignore[attr-defined]  # torch's stub has multi_get alone
        came = [json.loads(value or "null") for value in store.multi_get([f"{self._round}/{key}" for key in keys])]
        here = [heard.lately(value) and value for heard, value in zip(self._heard, came, strict=True)]
        missing = [rank for rank, value in enumerate(here, 1) if not value]
        self.missing = _describe(missing, self.size)
        store.set("round", json.dumps([self._round, self._pulse, self.missing]))
        why = STOPPED if any(value and value[2] for value in came) else self._leaves
        if missing and not why:
            return None
        outcome = Outcome([self.token] + [value[0] if value else "" for value in came], why)
        store.set(f"{self._round}/outcome", json.dumps(outcome))
        return outcome


class _Other(_Rank):
    """Any other rank: it says that it is there, and waits for what the first one decides."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._heard = _Heard()

    def _look(self, store: dist.Store) -> Outcome | None:
        news = json.loads(store.get("round")) if store.check(["round"]) else None
        self.reaches_first = self._heard.lately(news) and news is not None
        self.missing = news[2] if news is not None and self.reaches_first else "rank 0 is missing"
        if news is None:
            return None
        self._round = news[0]
        store.set(f"{self._round}/{_key(self.rank)}", json.dumps([self.token, self._pulse, self._leaves == STOPPED]))
        if not store.check([f"{self._round}/outcome"]):
            return None
        outcome = Outcome(*json.loads(store.get(f"{self._round}/outcome")))
        if outcome.tokens[self.rank : self.rank + 1] != [self.token]:
            return None  # it is of processes of an earlier attempt
        if len(outcome.tokens) != self.size:
            raise ConfigError(
                f"WORLD_SIZE is {self.size} here, but {len(outcome.tokens)} on rank 0: make them the same"
            )
        return outcome


def _key(rank: int) -> str:
    return f"rank_{rank}"


def _describe(missing: list[int], size: int) -> str:
    """'1 of 2 ranks connected, rank 1 is missing'."""
    named = ", ".join(map(str, missing[:MOST_NAMED]))
    if len(missing) > MOST_NAMED:
        named += f" and {len(missing) - MOST_NAMED} more"
    return f"{size - len(missing)} of {size} ranks connected, rank{'s' * (len(missing) > 1)} {named} " + (
        "is missing" if len(missing) == 1 else "are missing"
    )


def _listen(port: int) -> int:
    """A socket that listens there. Raises ConfigError: nobody else may."""
    with suppress(OSError):  # no IPv6, or as below
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).detach()
    try:
        return socket.create_server(("", port)).detach()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else one_line(error)
        raise ConfigError(f"MASTER_PORT={port} cannot be used: {reason}: name another one") from None
