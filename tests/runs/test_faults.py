"""What a run makes of faults that are injected; of a kill, a flipped bit and a slow rank the tests are elsewhere."""

import pytest

from harness.forks import ForkedProgram, forked
from harness.resuming import names
from harness.runs import SHORT, TRAIN, flags, wait_for

ALLOWED = {"NANOGPT_ALLOW_FAULTS": "1"}
# A save is written meanwhile: on a busy machine that of step 2 would still be under way when the disk is full.
SAVED_AT_ONCE = """
import train_overfit
from nanogpt.storage.checkpoint import CheckpointWriter

begin = CheckpointWriter.begin


def begin_and_wait(self, *given):
    begin(self, *given)
    self._thread.join()


CheckpointWriter.begin = begin_and_wait
train_overfit.main(train_overfit.run)
"""
OPTIONS = SHORT | {"dtype": "fp32", "max_steps": 6, "checkpoint_every": 2, "wandb": "disabled", "out_dir": "out"}


@pytest.mark.slow
def test_a_rank_that_freezes_is_named(tmp_path, monkeypatch):
    """Invariant: SIGSTOP in step 3: the other leaves with status 1, and says which one does not answer."""
    words = flags(**OPTIONS, inject="freeze:rank=1,step=3", comm_timeout_s=5)
    program = ForkedProgram(2, tmp_path, tmp_path / "log", TRAIN, *words, **ALLOWED)
    try:
        wait_for(lambda: program.poll() is not None)
    finally:
        program.kill()
    log = (tmp_path / "log").read_text()
    assert program.poll() == 1, log
    assert "rank 1 does not answer" in log


@pytest.mark.slow
def test_a_disk_that_is_full_ends_no_run(tmp_path):
    """Invariant: from step 4 on nothing large can be written: what was saved stays, and a warning says so."""
    (tmp_path / "start.py").write_text(SAVED_AT_ONCE)
    words = flags(**OPTIONS, inject="full_disk:rank=0,step=4")
    done = forked(tmp_path, tmp_path / "start.py", *words, **ALLOWED)
    assert done.stdout.count("warning: this run is broken on purpose (--inject=full_disk:rank=0,step=4)") == 1
    assert "warning: the checkpoint of step 4 could not be saved" in done.stdout
    assert names(tmp_path / "out" / "checkpoints") == {"latest", "step_00000002"}
    assert (done.returncode, "model.safetensors cannot be written" in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / "out" / "report.json").exists()
