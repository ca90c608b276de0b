"""The lanes, what must be set before torch is imported, and the fixtures that several test files share."""

import os
import shutil

import pytest
from filelock import FileLock

# Two processes of two threads each on two cores take twice as long as with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"  # it takes seconds of each run; tests/runs/test_wandb.py shows it
pytest.register_assert_rewrite("harness.resuming", "harness.runs")
pytest_plugins = ["harness.lanes"]

from harness import forks  # noqa: E402
from harness.runs import TINY, TINY_SHAKESPEARE, flags, train  # noqa: E402


@pytest.fixture(scope="session")
def forked():
    """forked(cwd, PROGRAM, WORDS) runs a script or module to its end without its start -> CompletedProcess."""
    return forks.forked


@pytest.fixture
def no_wandb_settings(monkeypatch):
    """No WANDB_ variable, neither a person's nor the one above."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


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
