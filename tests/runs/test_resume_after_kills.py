"""A run that is killed, or whose disk is full, goes on from what it saved; so do all its ranks. All of it is real."""

import random
import resource
import subprocess
import sys
import time

import pytest

from harness.resuming import (
    OPTIONS,
    assert_same,
    go,
    has_trained,
    kill,
    names,
    outcome,
    start,
    start_forked,
    words,
)
from harness.runs import TRAIN, WORKERS, environment, flags, metrics, report, run, wait_for


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero 3"])
def test_all_ranks_save_together(engine, tmp_path, uninterrupted):
    """Reference: the same engine undisturbed, bit for bit.

    TERM goes to torchrun, which passes it on to its workers, and leaves with 1 for that; a file STOP is theirs alone.
    """
    program = start(tmp_path, engine)
    wait_for(has_trained(tmp_path), program)
    if engine == "ddp":
        (tmp_path / "out" / "STOP").touch()
    else:
        program.terminate()
    assert program.wait(timeout=200) == (0 if engine == "ddp" else 1)
    assert report(tmp_path / "out")["exit_reason"] == "stopped"
    assert go(tmp_path, engine).returncode == 0
    assert_same(tmp_path, uninterrupted(engine))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "planned"), [("single", 8), ("sharded", 4)])
def test_killed_again_and_again_it_ends_the_same(engine, planned, tmp_path, uninterrupted):
    """Reference: an undisturbed run, bit for bit. SIGKILL at random moments, a save every step, so in saves too."""
    moments = random.Random(0)
    kills, saved = 0, tmp_path / "out" / "checkpoints"
    while kills < planned:
        before = names(saved)
        program = start_forked(tmp_path, engine, checkpoint_every=1, log_every=1)
        wait_for(lambda before=before: names(saved) != before, program)
        time.sleep(moments.uniform(0.0, 0.25))
        if program.poll() is not None:
            break
        program.kill()
        kills += 1
    assert 2 * kills >= planned, "the run was over too soon to be killed often"
    assert go(tmp_path, engine, checkpoint_every=1, log_every=1).returncode == 0
    rows, told, weights = outcome(tmp_path)
    expected_rows, expected_told, expected_weights = uninterrupted(engine)
    assert [row["step"] for row in rows] == list(range(1, told["steps"] + 1)), "each step once"
    assert (told, weights) == (expected_told, expected_weights)
    losses = {row["step"]: row["full_pass_loss"] for row in rows}
    assert all(losses[row["step"]] == row["full_pass_loss"] for row in expected_rows)


LIMIT = 8 * 2**20  # bytes a file, less than the weights, and than any rank's share of weights and moments


def limited():
    """For preexec_fn: no file can grow over LIMIT."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


def test_no_room_for_the_weights_is_one_line(tmp_path):
    """Invariant: a run that cannot write its result says so, with status 1, and leaves no report of it."""
    env = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(
        words(max_steps=2), cwd=tmp_path, preexec_fn=limited, env=env, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "model.safetensors cannot be written" in done.stderr
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_a_full_disk_does_not_end_the_run(engine, tmp_path):
    """Invariant: a checkpoint that cannot be written is warned of; the run goes on, and the one before stays usable."""
    slow = {"learning_rate": 1e-5}  # no target within the test
    assert go(tmp_path, engine, **slow, max_steps=4).returncode == 3
    program = start(tmp_path, engine, limited, **slow, checkpoint_every=2, max_minutes=15)
    try:
        wait_for(lambda: (tmp_path / "log").read_text().count("could not be saved (") >= 2, program)
        assert program.poll() is None, (tmp_path / "log").read_text()
        # Not a kill: that may leave a half-written checkpoint, for the next run to clear.
        (tmp_path / "out" / "STOP").touch()
        assert program.wait(timeout=200) == (4 if engine == "single" else 0)
    finally:
        if program.poll() is None:
            kill(program)
    assert "this step could not be saved; the same command goes on from step 4" in (tmp_path / "log").read_text()
    assert names(tmp_path / "out" / "checkpoints") == {"latest", "step_00000004"}
    done = go(tmp_path, engine, **slow, max_steps=8)
    assert done.returncode == 3
    assert "resumed from step_00000004" in done.stdout
    assert report(tmp_path / "out")["steps"] == 8


@pytest.mark.slow
def test_a_restarted_group_does_not_look_for_the_dead(tmp_path):
    """Invariant: a rank that is back first waits for its peer, though torchrun's store still has the old address."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    done = run(*launcher, WORKERS / "restart_worker.py", cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, "restarted True, 2 ranks met\n"), done.stderr


@pytest.mark.slow
def test_a_restart_does_not_spend_a_budget_again(tmp_path):
    """Invariant: torchrun restarts a run whose time is up, as it does after any failure; nothing is trained or scored.

    The status stays that of a target that was not reached.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--max_restarts=1"]
    words = flags(**OPTIONS, max_minutes=1e-6, out_dir="out")
    done = run(*launcher, TRAIN, *words, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert (done.returncode, report(tmp_path / "out")["exit_reason"]) == (1, "max_minutes"), done.stderr
    assert (done.stdout.count("scoring"), done.stdout.count("has spent its --max_minutes already")) == (1, 1)
    assert report(tmp_path / "out")["steps"] == len(metrics(tmp_path / "out")) == 1


@pytest.mark.slow
def test_torchrun_brings_a_killed_worker_back(tmp_path, uninterrupted):
    """Reference: two undisturbed DDP ranks, bit for bit: torchrun --max_restarts starts the group again by itself.

    With --resume=never, by which the first group began the run that the second one goes on with.
    """
    options = flags(**OPTIONS, checkpoint_every=2, out_dir="out", resume="never", inject="kill:rank=1,step=8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3"]
    done = run(*launcher, TRAIN, *options, cwd=tmp_path, env={"OMP_NUM_THREADS": "1", "NANOGPT_ALLOW_FAULTS": "1"})
    assert (done.returncode, "resumed from step_" in done.stdout) == (0, True), done.stderr
    assert_same(tmp_path, uninterrupted("ddp"))
