"""What can happen to a job, made to happen on a real cluster, with the times that it takes.

played = time_limit(cluster, cwd)

test_slurm.py says what must hold afterwards. As a program it starts a cluster, plays all of them and writes their times
as JSON, of which benchmarks/slurm_scenarios.py makes a table; status 2 and the reason where there can be no cluster:

    python tests/slurm/scenarios.py times.json
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import CPU_NODES, Cluster, Job, slurm, start_cluster, why_not


@dataclass(frozen=True)
class Played:
    """A scenario that has been played. None: it has no such moment."""

    job: Job
    saved_s: float | None  # from the event until rank 0 said that all ranks had saved
    left_s: float  # from the event until the job was over, or given back to the queue
    first_step_s: float | None  # from there until the next attempt had trained a step


def time_limit(cluster: Cluster, cwd: Path) -> Played:
    """USR1 to the batch script, as Slurm sends it before the time limit."""
    job = train_a_little(cluster, cwd)
    return requeued(job, since=job.signal_batch_script("USR1"), saves=True)


def preemption(cluster: Cluster, cwd: Path) -> Played:
    """A job of a higher partition takes the nodes: TERM to all, and KILL after KillWait."""
    job = train_a_little(cluster, cwd)
    return requeued(job, since=preempt(cwd), saves=True)


def preemption_with_grace(cluster: Cluster, cwd: Path) -> Played:
    """The same out of a partition with GraceTime: TERM to the ranks alone."""
    job = train_a_little(cluster, cwd, "--partition=grace")
    return requeued(job, since=preempt(cwd), saves=True)


def power_cut(cluster: Cluster, cwd: Path) -> Played:
    """The second node falls silent. Slurm notices after SlurmdTimeout, which is 10 s here and 300 s by default."""
    return lost_node(cluster, cwd, cluster.cut)


def node_crash(cluster: Cluster, cwd: Path) -> Played:
    """All processes of the second node die: the other ranks fail before Slurm knows why."""
    return lost_node(cluster, cwd, cluster.crash)


def cancel(cluster: Cluster, cwd: Path) -> Played:
    """scancel."""
    job = train_a_little(cluster, cwd)
    since = time.time()
    slurm("scancel", job.id)
    over = job.wait_until_over()
    return Played(job, saved_s=saved_at(job) - since, left_s=over - since, first_step_s=None)


def failing_rank(cluster: Cluster, cwd: Path) -> Played:
    """The last rank is killed."""
    job = train_a_little(cluster, cwd)
    since = time.time()
    os.kill(max(job.ranks()), signal.SIGKILL)
    return Played(job, saved_s=None, left_s=job.wait_until_over() - since, first_step_s=None)


SCENARIOS = {
    "time limit": time_limit,
    "preemption": preemption,
    "preemption with a grace time": preemption_with_grace,
    "power cut of a node": power_cut,
    "crash of a node": node_crash,
    "scancel": cancel,
    "a rank fails": failing_rank,
}


def train_a_little(cluster: Cluster, cwd: Path, *words: str) -> Job:
    """A job on two nodes that has trained past its first checkpoint, which a thread may be long in writing."""
    job = cluster.submit(cwd, "--nodes=2", *CPU_NODES, *words)
    latest = job.run_dir / "checkpoints" / "latest"
    job.wait_until(lambda: job.steps > 12 and latest.exists(), "it has a checkpoint and has trained 12 steps")
    return job


def lost_node(cluster: Cluster, cwd: Path, lose: Callable[[str], float]) -> Played:
    """lose: ends the second node of the job -> when."""
    job = train_a_little(cluster, cwd)
    node = slurm("scontrol", "show", "hostnames", job.facts["NodeList"]).split()[1]
    try:
        return requeued(job, since=lose(node), saves=False)
    finally:
        cluster.boot(node)


def requeued(job: Job, *, since: float, saves: bool) -> Played:
    """The job is given back to the queue after the event, and ends its training in its next attempt."""
    left = job.wait_until(lambda: job.restarts == 1, "it is requeued")
    first_step = job.wait_until(lambda: job.trains(attempt=1), "it trains again")
    job.wait_until_over()
    return Played(job, saved_at(job) - since if saves else None, left - since, first_step - left)


def saved_at(job: Job) -> float:
    """When rank 0 of the first attempt said, as its last word, that all ranks had saved."""
    log = job.rank_log(attempt=0)
    assert log.read_text().splitlines()[-1].startswith("saved;"), log.read_text()
    return log.stat().st_mtime


def preempt(cwd: Path) -> float:
    """Submit a short job that needs every node and outranks all others -> the time."""
    since = time.time()
    slurm("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=cwd)
    return since


def times(played: Played) -> dict[str, Any]:
    """What became of a job, and what that took."""
    return {
        "state": played.job.state,
        "restarts": played.job.restarts,
        "saved_s": played.saved_s,
        "left_s": played.left_s,
        "first_step_s": played.first_step_s,
        "device": json.loads((played.job.run_dir / "config.json").read_text())["device"],
    }


def play_all() -> dict[str, Any]:
    """Every scenario's times, on a cluster of three nodes, and what Slurm it is."""
    with start_cluster(nodes=3) as cluster, tempfile.TemporaryDirectory() as directory:
        settings = slurm("scontrol", "show", "config").splitlines()
        known = dict(map(str.strip, line.split("=", 1)) for line in settings if "=" in line)
        scenarios = {}
        for name, play in SCENARIOS.items():
            cwd = Path(directory, name)
            cwd.mkdir()
            scenarios[name] = times(play(cluster, cwd))
    return {"scenarios": scenarios, "slurm": {key: known[key] for key in ("SLURM_VERSION", "ProctrackType")}}


if __name__ == "__main__":
    if reason := why_not():
        print(reason, file=sys.stderr)
        sys.exit(2)
    Path(sys.argv[1]).write_text(json.dumps(play_all()))
