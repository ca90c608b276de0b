"""Jobs of slurm/train.sh on the real Slurm cluster that cluster.sh starts.

with start_cluster(nodes=3) as cluster:
    job = cluster.submit(cwd, "--nodes=2", options={"max_steps": 10})
    job.wait_until(lambda: job.steps >= 5, "it trains")
"""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CLUSTER = REPOSITORY / "tests" / "slurm" / "cluster.sh"
LOCK = Path("/tmp/slurm-cluster.lock")
CPU_NODES = ("--gpus-per-node=0",)  # one rank a node
# About 80 steps of 0.1 s, with full passes, averaged weights and checkpoints on the way.
TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 64, "subset_tokens": 64, "context_length": 32, "batch_size": 4,
    "learning_rate": 4e-3, "dtype": "fp32", "target_loss": 0.2, "ema": 0.5, "on_plateau": "none", "log_every": 1,
    "checkpoint_every": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One job, its log and its run directory."""

    id: str
    cwd: Path
    name: str = ""  # in its folder; none: its id
    folder: str = "runs"

    @property
    def run_dir(self) -> Path:
        return self.cwd / self.folder / (self.name or self.id)

    @property
    def log(self) -> str:
        """What the job has said, in all its attempts."""
        path = self.cwd / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    @property
    def facts(self) -> dict[str, str]:
        """What Slurm knows of it: JobState, Restarts, ExitCode, NodeList, ..."""
        shown = slurm("scontrol", "--oneliner", "show", "job", self.id)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts["Restarts"])

    @property
    def steps(self) -> int:
        """How many steps have been logged."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "report.json").read_text())

    def rank_log(self, attempt: int, rank: int = 0) -> Path:
        return self.run_dir / "logs" / f"{self.run_dir.name}.{attempt}" / f"rank_{rank}.log"

    def trains(self, attempt: int) -> bool:
        """Whether that attempt has logged a step."""
        path = self.rank_log(attempt)
        return path.exists() and "\nstep " in path.read_text()

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 300) -> float:
        """Wait for condition() -> the time when it held."""
        give_up = time.time() + timeout_s
        while not condition():
            assert time.time() < give_up, f"after {timeout_s} s not yet: {what}; {self.facts}\n{self.log}"
            time.sleep(0.05)
        return time.time()

    def wait_until_over(self, timeout_s: float = 400) -> float:
        """Wait until Slurm has no more to do for the job -> the time."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return self.wait_until(lambda: self.state in over, "the job is over", timeout_s)

    def ranks(self) -> list[int]:
        """The process ids of its ranks, wherever they run."""
        mine = str(self.run_dir / "code" / self.run_dir.name / "train_overfit.py").encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if words[1:2] == [mine]:
                found.append(int(process.name))
        return found

    def signal_batch_script(self, name: str) -> float:
        """Send what --signal=B:NAME sends near the time limit -> the time."""
        slurm("scancel", "--batch", f"--signal={name}", self.id)
        return time.time()


class Cluster:
    """A running cluster."""

    def submit(
        self,
        cwd: Path,
        *words: str,
        options: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        script: Path = REPOSITORY / "slurm" / "train.sh",
    ) -> Job:
        """sbatch WORDS slurm/train.sh OPTIONS, of a tiny model unless they say otherwise."""
        flags = [f"--{name}={value}" for name, value in (TINY | (options or {})).items()]
        return Job(slurm("sbatch", "--parsable", *words, str(script), *flags, cwd=cwd, env=env).strip(), cwd)

    def cut(self, node: str) -> float:
        """A power cut of a node -> the time."""
        control("cut", node)
        return time.time()

    def crash(self, node: str) -> float:
        """The death of every process of a node -> the time."""
        control("crash", node)
        return time.time()

    def freeze(self, node: str) -> float:
        """Let a node's slurmd hang, while what runs there goes on -> the time."""
        control("freeze", node)
        return time.time()

    def forget(self, job_id: str) -> None:
        """Lose all that the controller knows of jobs; the next one gets job_id."""
        control("forget", job_id)

    @contextmanager
    def slowed(self, node: str, rate: str) -> Iterator[None]:
        """What a node receives comes at no more than rate, '10mbit'."""
        control("slow", node, rate)
        try:
            yield
        finally:
            control("slow", node, "0")

    @contextmanager
    def throttled(self, node: str, percent: int) -> Iterator[None]:
        """What runs on a node, and begins there, gets so much of one core."""
        control("quota", node, str(percent))
        try:
            yield
        finally:
            control("quota", node, "0")

    def boot(self, node: str) -> None:
        """Bring a node back, and wait until it is idle."""
        control("boot", node)
        give_up = time.time() + 180
        while "idle" not in slurm("sinfo", "--noheader", "--nodes", node, "--partition=main", "--format=%t").split():
            assert time.time() < give_up, f"{node} does not come back"
            time.sleep(0.1)


@contextmanager
def start_cluster(nodes: int) -> Iterator[Cluster]:
    """A cluster, taken down in the end. There can be one on a machine: BlockingIOError where another process has it."""
    with LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        control("up", str(nodes))
        try:
            yield Cluster()
        finally:
            control("down")


def why_not() -> str:
    """Why there can be no cluster here, or ''."""
    return "" if (done := run("can")).returncode == 0 else done.stdout.strip()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """cluster.sh WORDS"""
    return subprocess.run([str(CLUSTER), *words], capture_output=True, text=True, timeout=300, check=False)


def control(*words: str) -> None:
    """cluster.sh WORDS, which must succeed."""
    done = run(*words)
    assert done.returncode == 0, done.stderr


def slurm(*words: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """A command of Slurm, which must succeed -> what it prints."""
    done = ask_slurm(*words, cwd=cwd, env=env)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def ask_slurm(
    *words: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command of Slurm. Jobs find this Python first, one thread and no real GPU."""
    conf = run("env").stdout.strip().removeprefix("export SLURM_CONF=")
    own = {"SLURM_CONF": conf, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        words, cwd=cwd, env=os.environ | own | (env or {}), capture_output=True, text=True, timeout=180, check=False
    )
