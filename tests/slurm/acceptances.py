"""Acceptances of a healthy cluster and of sick ones: slurm/accept.sh on the real Slurm that cluster.sh starts.

PYTHONPATH=. python tests/slurm/acceptances.py DIRECTORY     # plays all; DIRECTORY/NAME/acceptance.html

A slow node has a CPU quota, a dead one loses all its processes. A node that computes wrongly cannot be had: there a bit
of one weight is turned over on purpose.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from cluster import CPU_NODES, REPOSITORY, Cluster, Job, slurm, start_cluster, why_not

NODES = 4
TRAINING = (  # so small that it is over in seconds
    "--training=--n_layer=2 --n_head=2 --n_embd=64 --subset_tokens=256 --context_length=32 --learning_rate=3e-3"
)
QUOTA_PERCENT = 12  # of a core: ranks that share two cores have more, whatever else runs
WRONG = {"NANOGPT_ALLOW_FAULTS": "1"}


def accept(cluster: Cluster, cwd: Path, *words: str, nodes: int = NODES, env: dict[str, str] | None = None) -> Job:
    """Submit an acceptance."""
    script = REPOSITORY / "slurm" / "accept.sh"
    command = ("sbatch", "--parsable", f"--nodes={nodes}", *CPU_NODES, str(script), *words, TRAINING)
    return Job(slurm(*command, cwd=cwd, env=env).strip(), cwd, folder="acceptance")


def report(job: Job) -> dict:
    """What its acceptance.json holds now; nothing before there is one."""
    path = job.run_dir / "acceptance.json"
    return json.loads(path.read_text()) if path.exists() else {}


def healthy(cluster: Cluster, cwd: Path, *words: str, nodes: int = NODES) -> Job:
    """Nothing is wrong."""
    job = accept(cluster, cwd, *words, nodes=nodes)
    job.wait_until_over()
    return job


def slow_node(cluster: Cluster, cwd: Path, *words: str) -> Job:
    """The third node has a part of a core."""
    with cluster.throttled("node3", QUOTA_PERCENT):
        return healthy(cluster, cwd, *words)


def wrong_node(cluster: Cluster, cwd: Path, *words: str, nodes: int = NODES) -> Job:
    """On the third node a bit of a weight turns over in step 5 of the numerics."""
    job = accept(cluster, cwd, *words, "--inject=flip:rank=2,step=5", nodes=nodes, env=WRONG)
    job.wait_until_over()
    return job


def dead_node(cluster: Cluster, cwd: Path, *words: str) -> Job:
    """The second node dies when the network has been measured."""
    job = accept(cluster, cwd, *words)
    try:
        job.wait_until(lambda: "network" in report(job).get("seconds", {}), "the network is measured")
        cluster.crash("node2")
        job.wait_until_over()
    finally:
        cluster.boot("node2")
    return job


ACCEPTANCES: dict[str, Callable[..., Job]] = {
    "healthy": healthy, "slow_node": slow_node, "wrong_node": wrong_node, "dead_node": dead_node
}  # fmt: skip


# Everything on the healthy one; of the others what shows the fault, in less time.
WORDS = {
    "healthy": ("--minutes=7",),
    "slow_node": ("--minutes=3", "--stages=compute,network,training"),
    "wrong_node": ("--minutes=4", "--stages=compute,network,numerics"),
    "dead_node": ("--minutes=4",),
}


def play_all(directory: Path) -> None:
    """Each with all stages; its page and its figures go to directory/NAME."""
    with start_cluster(nodes=NODES) as cluster:
        for name, play in ACCEPTANCES.items():
            cwd = directory / f"{name}.job"
            cwd.mkdir(parents=True)
            job = play(cluster, cwd, *WORDS[name])
            print(f"{name}: {job.state}\n{job.log}", flush=True)
            shutil.copytree(job.run_dir, directory / name)


if __name__ == "__main__":
    if reason := why_not():
        print(reason, file=sys.stderr)
        sys.exit(2)
    play_all(Path(sys.argv[1]).absolute())
