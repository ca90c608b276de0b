"""A process that does one rank's part of a job, and that can be killed without harm to whoever started it.

with Child(Job("numerics", work=partial(measure_engine, engine="ddp")), log=Path("numerics.rank_0.log")) as child:
    while (outcome := child.poll()) is None: ...

It is forked from a server that has imported torch and has not touched a GPU: twenty starts cost what two would.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from nanogpt.config.files import read_file
from nanogpt.distributed.world import World

MEET_S = 60.0  # that the processes of a job wait for each other
GONE_S = 10.0  # that a process which was killed is waited for
TAIL_BYTES = 4000  # of a log, in which its last words are looked for
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["nanogpt.training.run", "nanogpt.acceptance.stages.numerics", "nanogpt.commands.train"])


@dataclass(frozen=True)
class Job:
    """What each rank starts a process for: a function, in a process group or apart, or the program with its words."""

    name: str  # of its logs
    work: Callable[[World], Any] | None = None  # of a module, or a partial of one
    apart: bool = False  # whether work makes no collective and gives each rank's own: it needs no other rank then
    words: tuple[str, ...] = ()  # nanogpt WORDS
    environ: Mapping[str, str] = field(default_factory=dict)
    limit_s: float = 60.0  # after which what still runs is killed
    port: int = 0  # where the first rank's process waits for the others; the first rank chooses it


@dataclass(frozen=True)
class Outcome:
    """How one rank's process ended."""

    status: int | None  # as subprocess has it, -9 where SIGKILL ended it; None: it had to be killed, as tail tells
    value: Any = None  # what work returned
    tail: str = ""  # the last of what it printed

    @property
    def said(self) -> str:
        """Its last line; '' where it printed nothing."""
        return next((line.strip() for line in reversed(self.tail.splitlines()) if line.strip()), "")


class Child:
    """One of them."""

    def __init__(self, job: Job, *, log: Path) -> None:
        """log: what it prints, appended. Raises OSError where that cannot be written."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._began, self._value = log, time.monotonic(), None
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
        self._answer, answer = SERVER.Pipe(duplex=False)
        alive, self._alive = SERVER.Pipe(duplex=False)  # ours closes when this process ends, however it does
        self._process = SERVER.Process(target=_become, args=(job, str(log), answer, alive))
        self._process.start()
        answer.close()
        alive.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join(GONE_S)  # not for ever: a process may wait for a disk or a GPU that never answers
        with suppress(OSError):
            if not self._log.stat().st_size:
                self._log.unlink()

    @property
    def age_s(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._began

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self._process.exitcode is None and self._process.pid:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def poll(self) -> Outcome | None:
        """How it ended; None while it runs."""
        status = self._process.exitcode  # before its answer, which may come at the last moment
        with suppress(EOFError):
            if self._answer.poll():
                self._value = self._answer.recv()
        return None if status is None else Outcome(status, self._value, _tail(self._log))


def _tail(log: Path) -> str:
    """The last of what a process has printed; '' where that cannot be read."""
    try:
        return read_file(log)[-TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""


def _become(job: Job, log: str, answer: Connection, alive: Connection) -> None:
    """In the new process: do its part."""
    Thread(target=_end_with, args=(alive,), daemon=True).start()
    for descriptor, its_own in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(log, os.O_WRONLY | os.O_APPEND), 1)):
        os.dup2(descriptor, its_own)
    os.dup2(1, 2)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # it is no worker of torchrun's: another store, and nobody who starts it again
    os.environ |= job.environ
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ["MASTER_PORT"] = str(job.port)
    if job.work is None:
        sys.argv = ["nanogpt", *job.words]
        runpy.run_module("nanogpt", run_name="__main__", alter_sys=True)
        return
    status = 1
    try:
        world = World.from_env()
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # a process group does so too; else events would be of GPU 0
        with nullcontext() if job.apart else world.process_group(world.meet(timeout_s=MEET_S), even_alone=True):
            answer.send(job.work(world))
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once, as nanogpt.config.cli does: gloo's threads may abort a process that ends


def _end_with(alive: Connection) -> None:
    """End this process when the one that wants its answer is gone."""
    with suppress(EOFError, OSError):
        alive.recv()
    os.kill(os.getpid(), signal.SIGKILL)
