"""Of the attempts of one Slurm job, the newest alone writes the run directory.

    attempt = Attempt.from_env()
    fence = attempt.raise_fence(out_dir)
    fence.check()                   # before each write

A node that Slurm has given up may still run its part of the job when the job has been requeued elsewhere. A kernel lock
keeps such a copy out only where the file system shares locks between nodes, and many do not.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from nanogpt.errors import ConfigError
from nanogpt.files import read_file, whole

FENCE = ".attempt"


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
            raise ConfigError(f"attempt {number} of job {job} writes {out_dir} now: this is attempt {self.number}")
        return int(number) < self.number

    def raise_fence(self, out_dir: Path) -> "Fence":
        """Let out_dir be written by this attempt alone."""
        if not self.job and not (out_dir / FENCE).exists():  # nobody to keep out
            return NoFence()
        with whole(out_dir / FENCE) as file:
            file.write(str(self).encode())
        return Fence(out_dir, str(self)) if self.job else NoFence()


@dataclass(frozen=True)
class Fence:
    """Keeps out whoever did not raise it."""

    out_dir: Path
    mine: str

    def check(self) -> None:
        """Raises SystemExit when another attempt has raised it since."""
        try:
            now = _written(self.out_dir)
        except OSError:  # a network file system's hiccup
            return
        if now and now != self.mine:
            raise SystemExit(f"error: attempt {now} writes {self.out_dir} now, not {self.mine}: leaving it alone")


class NoFence(Fence):
    """Outside Slurm, and of ranks that write only their part of a checkpoint, under a name of their attempt."""

    def __init__(self) -> None:
        super().__init__(Path(), "")

    def check(self) -> None:
        pass


def _written(out_dir: Path) -> str:
    """Who raised the fence of out_dir: 'JOB.ATTEMPT', or '' where nobody has or it is damaged."""
    try:
        found = read_file(out_dir / FENCE).decode(errors="replace")
    except FileNotFoundError:
        return ""
    return found if re.fullmatch(r"[^.]*\.[0-9]{1,9}", found) else ""
