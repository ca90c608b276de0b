"""Of the attempts of one Slurm job, the newest alone writes the run directory.

    attempt = Attempt.from_env()
    fence = attempt.raise_fence(out_dir)
    fence.check()                   # before each write
    fence.check(every_s=LOOK_S)     # now and then: it may be on a shared disk

A node that Slurm has given up may still run its part of the job when the job has been requeued elsewhere. A kernel lock
keeps such a copy out only where the file system shares locks between nodes, and many do not.
"""

import os
import re
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nanogpt.config.errors import ConfigError, RunError
from nanogpt.config.files import lock, read_file, regular, whole
from nanogpt.storage.run_dir import CONFIG, check_writable, refused_writes
from nanogpt.utils.console import say

FENCE = ".attempt"
LOCK = ".lock"
TAKEOVER_S = 60.0  # within which an earlier attempt of the same job finds the fence and leaves


@dataclass(frozen=True)
class Attempt:
    """Which job runs here, and for which time; outside Slurm no job, and attempt 0."""

    job: str
    number: int

    @classmethod
    def from_env(cls) -> "Attempt":
        """What slurm/train.sh put into the environment, which knows numbers that Slurm uses again; else Slurm itself.

        Raises ConfigError where that is no attempt.
        """
        job = os.environ.get("RUN_JOB") or os.environ.get("SLURM_JOB_ID", "")
        count = os.environ.get("SLURM_RESTART_COUNT", "")
        if job and not re.fullmatch("[0-9]{0,9}", count):
            raise ConfigError(f"SLURM_RESTART_COUNT={count} must be a whole number")
        return cls(job, int(count or 0) if job else 0)

    def __str__(self) -> str:
        return f"{self.job}.{self.number}" if self.job else ""

    def follows(self, out_dir: Path) -> bool:
        """Whether an earlier attempt of this job wrote out_dir last. Raises ConfigError when it was a later one."""
        job, _, number = _written(out_dir).partition(".")
        if not self.job or job != self.job:
            return False
        if int(number) > self.number:
            raise ConfigError(
                f"attempt {number} of job {job} has taken over {out_dir}: this attempt, {self.number}, ends"
            )
        return int(number) < self.number

    def raise_fence(self, out_dir: Path) -> "Fence":
        """Let out_dir be written by this attempt alone."""
        if not self.job and not (out_dir / FENCE).exists():  # nobody to keep out
            return NoFence()
        with whole(out_dir / FENCE) as file:
            file.write(str(self).encode())
        return Fence(out_dir, str(self)) if self.job else NoFence()


class Fence:
    """Keeps out whoever did not raise it."""

    def __init__(self, out_dir: Path, mine: str) -> None:
        """mine: 'JOB.ATTEMPT', who raised it."""
        self.out_dir, self.mine = out_dir, mine
        self._looked_at = 0.0

    def check(self, every_s: float = 0.0) -> None:
        """Raises RunError when another attempt has raised it since. every_s: do not look sooner after the last look."""
        if (now_s := time.monotonic()) - self._looked_at < every_s:
            return
        self._looked_at = now_s
        try:
            now = _written(self.out_dir)
        except OSError:  # a network file system's hiccup
            return
        if now and now != self.mine:
            raise RunError(f"attempt {now} has taken over {self.out_dir}: this attempt, {self.mine}, ends")


class NoFence(Fence):
    """Outside Slurm, and of ranks that write only their part of a checkpoint, under a name of their attempt."""

    def __init__(self) -> None:
        super().__init__(Path(), "")

    def check(self, every_s: float = 0.0) -> None:
        pass


def _written(out_dir: Path) -> str:
    """Who raised the fence of out_dir: 'JOB.ATTEMPT', or '' where nobody has or it is damaged."""
    try:
        found = read_file(out_dir / FENCE).decode(errors="replace")
    except FileNotFoundError:
        return ""
    return found if re.fullmatch(r"[^.]*\.[0-9]{1,9}", found) else ""


def take_over(out_dir: str, attempt: Attempt) -> None:
    """Make an earlier attempt of the same Slurm job leave out_dir, if it still writes there.

    Before anything is read: it would go on saving checkpoints and dropping old ones. Raises ConfigError when the
    attempt that wrote last is a later one, or out_dir cannot be written.
    """
    path = check_writable(out_dir)
    with refused_writes(out_dir):
        if attempt.follows(path):
            attempt.raise_fence(path)
            with suppress(BlockingIOError), open(path / LOCK, "a", opener=regular) as held_by_it:
                lock(held_by_it, TAKEOVER_S)


@contextmanager
def hold_run_dir(out_dir: Path, attempt: Attempt) -> Iterator[Fence]:
    """out_dir, made if it is not there, for this process alone. Raises ConfigError while another process has it.

    A process that the lock does not reach, on another node or where the file system has no locks, is kept out by the
    fence, if it is an earlier attempt of the same job.
    """
    with refused_writes(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        attempt.follows(out_dir)  # refused where a later one has come in the meantime
        file = open(out_dir / LOCK, "a", opener=regular)  # noqa: SIM115, the caller's
        try:
            locked = lock(file, patience_s=0.0)
        except BlockingIOError:
            raise ConfigError(f"--out_dir={out_dir} is being written by another run: wait for it, or stop it") from None
        fence = attempt.raise_fence(out_dir)
    if not locked:
        say(f"warning: the file system of {out_dir} has no locks: do not start a second run in it")
    with file:
        yield fence


def loss_of(out_dir: Path) -> Callable[[], bool]:
    """A question for later: whether out_dir, which is held and claimed, was removed, emptied or replaced since."""
    descriptor = os.open(out_dir, os.O_RDONLY | os.O_DIRECTORY)  # while it is open no other directory gets its number
    mine = os.fstat(descriptor)

    def is_lost() -> bool:
        try:
            os.stat(out_dir / CONFIG)
            return not os.path.samestat(mine, os.stat(out_dir))
        except FileNotFoundError:
            return True
        except OSError:  # a network file system's hiccup
            return False

    weakref.finalize(is_lost, os.close, descriptor)
    return is_lost
