"""What several test files share: a tiny model's options, and the programs run as a user runs them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanogpt.distributed.world import World

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = REPOSITORY / "tests" / "harness" / "workers"
TRAIN = REPOSITORY / "train_overfit.py"
TINY_SHAKESPEARE = Path(
    os.environ.get("TINY_SHAKESPEARE", REPOSITORY.parent / "shared" / "data" / "tinyshakespeare.txt")
)
# Seconds on one core; trains to 0.099 in about 150 steps.
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "subset_tokens": 256, "context_length": 32, "learning_rate": 3e-3}
SHORT = TINY | {"subset_tokens": 40, "batch_size": 4}  # for a few steps whose scores nobody reads
CLOCKS = ("_s", "memory_bytes", "mfu", "time_share", "slowest_rank", "_host", "_ratio")  # ends of their names
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def flags(**options):
    """--name=value for each option."""
    return [f"--{name}={value}" for name, value in options.items()]


def environment(**more):
    """This process's, without what launchers leave there."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in launchers}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    # The suite compares CPU runs, on a machine with GPUs too; tests/gpu shows them.
    return inherited | {"PYTHONPATH": path, "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": ""} | more


def run(*words, cwd, timeout=300, env=None):
    """Run a program to its end -> CompletedProcess with text output."""
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment(**(env or {})), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=timeout, check=False,
    )  # fmt: skip


def train(*words, cwd, timeout=300, env=None):
    """python train_overfit.py WORDS"""
    return run(sys.executable, TRAIN, *words, cwd=cwd, timeout=timeout, env=env)


def torchrun(ranks, *words, cwd, timeout=300, env=None, script=TRAIN):
    """torchrun --nproc_per_node=RANKS SCRIPT WORDS, on a free port"""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    return run(*launcher, script, *words, cwd=cwd, timeout=timeout, env={"OMP_NUM_THREADS": "1"} | (env or {}))


def compiling_alone(directory):
    """The environment of a run that compiles: in a cache of its own, as another may hold what a killed run left.

    A rank compiles itself, instead of by processes of its own, which would import torch again.
    """
    return {"TORCHINDUCTOR_CACHE_DIR": str(directory / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def wait_for(condition, process=None, seconds=240):
    """Wait until condition() holds or the process ends."""
    give_up = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < give_up, "timed out"
        time.sleep(0.02)


def free_port():
    """A TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def metrics(run_dir):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def report(run_dir):
    """A run's report.json."""
    return json.loads((Path(run_dir) / "report.json").read_text())


def without_clocks(figures):
    """A row or a report without what a clock or the machine's memory decides."""
    return {name: value for name, value in figures.items() if not name.endswith(CLOCKS)}


def outcome(run_dir):
    """All that a run says of itself but clocks and memory: (rows, report, weights)."""
    rows = [without_clocks(row) for row in metrics(run_dir)]
    return rows, without_clocks(report(run_dir)), (Path(run_dir) / "model.safetensors").read_bytes()


def assert_verified(run_dir):
    """One process finds, from the saved weights, the scores that the ranks of a run computed together."""
    from nanogpt.evaluate.verify import verify_run
    from nanogpt.storage.run_dir import load_run

    loaded = load_run(str(run_dir))
    checks = list(verify_run(loaded, Path(run_dir)))
    assert len(checks) > 40
    assert [check for check in checks if not check.fits] == []
