"""The fixtures that several test files share."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from filelock import FileLock

pytest.register_assert_rewrite("harness")
os.environ["WANDB_MODE"] = "disabled"  # it takes seconds of each run; tests/runs/test_wandb.py shows it

from harness.runs import REPOSITORY, TINY, TINY_SHAKESPEARE, environment, flags, train  # noqa: E402


@pytest.fixture(scope="session")
def forked():
    """forked(cwd, PROGRAM, WORDS) runs a script or module to its end on one thread -> CompletedProcess, as run() does.

    It is a fork of forking_server.py, with what that has imported: for programs that are to refuse or to print.
    """
    server = [sys.executable, REPOSITORY / "tests" / "harness" / "forking_server.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(server, env=environment(OMP_NUM_THREADS="1"), **pipes) as process:

        def ask(cwd, *words):
            print(json.dumps([*map(str, (cwd, *words))]), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, f"forking_server.py ended: {process.wait()}"
            done = subprocess.CompletedProcess(words, *json.loads(answer))
            assert done.returncode != -signal.SIGKILL, f"timed out: {words}"
            return done

        yield ask


@pytest.fixture(scope="session")
def tiny_shakespeare():
    """The path of the real corpus, which is not part of the project."""
    if not TINY_SHAKESPEARE.exists():
        pytest.skip(f"{TINY_SHAKESPEARE} is missing: set TINY_SHAKESPEARE to a copy")
    return TINY_SHAKESPEARE


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A tiny run that has reached its target: (its directory, what the program printed); one for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    said = shared / "finished.txt"
    with FileLock(shared / "finished.lock"):
        if not said.exists():
            shutil.rmtree(shared / "finished", ignore_errors=True)  # of a worker that died
            options = TINY | {"batch_size": 8, "dtype": "fp32", "max_steps": 600, "out_dir": "finished"}
            done = train(*flags(**options), cwd=shared)
            assert done.returncode == 0, done.stdout + done.stderr
            said.write_text(done.stdout)
    return shared / "finished", said.read_text()
