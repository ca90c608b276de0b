"""A run that a test stops, kills and starts again, and all that it leaves."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from harness import runs
from harness.forks import ForkedProgram, forked_ranks, train
from harness.runs import TINY, TRAIN, environment, flags

# Averages weights from about step 20 on, makes full passes and reaches its target about step 40.
OPTIONS = TINY | {
    "subset_tokens": 64, "batch_size": 4, "learning_rate": 6e-3, "dtype": "fp32", "log_every": 3, "target_loss": 0.3,
    "ema": 0.5, "on_plateau": "none",
}  # fmt: skip
ENGINES = {
    "single": (1, {}),
    "ddp": (2, {}),
    "sharded": (2, {"engine": "sharded"}),
    "sharded on 3": (3, {"engine": "sharded"}),
    "zero 1": (2, {"engine": "deepspeed", "zero_stage": 1}),
    "zero 2": (2, {"engine": "deepspeed", "zero_stage": 2}),
    "zero 3": (2, {"engine": "deepspeed", "zero_stage": 3}),
    "zero 3 on 4": (4, {"engine": "deepspeed", "zero_stage": 3}),
}


def words(engine="single", program=TRAIN, **options):
    """The command line of a run on an engine of ENGINES; program: instead of train_overfit.py."""
    ranks, chosen = ENGINES[engine]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(program), *flags(**(OPTIONS | chosen | options), out_dir="out")]


def go(cwd, engine="single", **options):
    """Run to the end without a start or launcher -> CompletedProcess, whose status is the ranks' own."""
    ranks, chosen = ENGINES[engine]
    words = flags(**(OPTIONS | chosen | options), out_dir="out")
    return train(*words, cwd=cwd) if ranks == 1 else forked_ranks(ranks, cwd, TRAIN, *words)


def start(cwd, engine="single", preexec_fn=None, **options):
    """A run in the background; preexec_fn: what its process does first."""
    with (cwd / "log").open("a") as log:
        env = environment(OMP_NUM_THREADS="1")
        command = words(engine, **options)
        return subprocess.Popen(command, cwd=cwd, preexec_fn=preexec_fn, env=env, stdout=log, stderr=log)


def start_forked(cwd, engine="single", program=TRAIN, **options):
    """The same without a start or launcher."""
    ranks, chosen = ENGINES[engine]
    return ForkedProgram(ranks, cwd, cwd / "log", program, *flags(**(OPTIONS | chosen | options), out_dir="out"))


def workers(launcher):
    """The processes that a launcher has started."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True).stdout.split()]


def kill(program):
    """SIGKILL for a run and its workers, which torchrun puts into sessions of their own."""
    for pid in [program.pid, *workers(program)]:
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.kill(pid, signal.SIGKILL)
    program.wait(timeout=200)


def catches(program, number):
    """Whether a process has set a handler for a signal: the bit mask that Linux keeps."""
    status = Path(f"/proc/{program.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def contents(directory):
    """All files below a directory but the lock, which holds nothing: {path: bytes}."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def has_trained(cwd, beyond=0):
    """Whether a run has logged a step later than this one."""
    rows = cwd / "out" / "metrics.jsonl"
    # Only whole lines: the newest may be being written.
    return lambda: (
        rows.exists()
        and any(
            json.loads(row)["step"] > beyond for row in rows.read_text().splitlines(keepends=True) if row.endswith("\n")
        )
    )


def names(directory):
    """What a directory holds, if it is there."""
    return set(os.listdir(directory)) if directory.exists() else set()


def outcome(cwd):
    """All that the run says of itself but clocks and memory: (rows, report, weights)."""
    return runs.outcome(cwd / "out")


def assert_same(cwd, expected):
    for got, wanted in zip(outcome(cwd), expected, strict=True):
        assert got == wanted
