"""A run that is asked to stop, at any moment, goes on as if nothing had happened: rows, report and weights."""

import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import termios
import time

import pytest

from harness.forks import forked_ranks
from harness.lanes import slow
from harness.resuming import (
    ENGINES,
    OPTIONS,
    assert_same,
    catches,
    contents,
    go,
    has_trained,
    names,
    outcome,
    start,
    start_forked,
    words,
)
from harness.runs import CLOCKS, TRAIN, environment, flags, report, wait_for
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.plan.plan import make_plan
from nanogpt.storage.checkpoint import newest_intact
from nanogpt.training.state import TrainState


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_goes_on(tmp_path, uninterrupted):
    """Reference: a run that was not stopped: the same rows, report and weights, bit for bit. Exit status 4 each."""
    steps = 0
    for how in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "STOP"):
        program = start_forked(tmp_path)
        wait_for(has_trained(tmp_path, beyond=steps), program)
        if how == "STOP":
            (tmp_path / "out" / "STOP").touch()
        else:
            program.send_signal(getattr(signal, how))
        assert program.wait(timeout=200) == 4
        told = report(tmp_path / "out")
        assert told["exit_reason"] == "stopped"
        assert steps < told["steps"] < uninterrupted("single")[1]["steps"]
        steps = told["steps"]
        assert re.search(rf"asked to stop by .*{how} at step {steps}: saving", (tmp_path / "log").read_text())
    assert go(tmp_path).returncode == 0
    assert_same(tmp_path, uninterrupted("single"))


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(tmp_path):
    """Invariant: exit status 1 in the middle of a step that takes half a minute, and nothing is saved."""
    program = start(tmp_path, batch_size=8192, micro_batch_size=8)
    wait_for(lambda: catches(program, signal.SIGTERM), program)  # it trains
    program.send_signal(signal.SIGINT)
    time.sleep(1.5)
    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=10) == 1
    assert (tmp_path / "log").read_text().endswith("interrupted\n")
    assert not names(tmp_path / "out" / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("hangs up", 4, "stopped"),
        ("says so first", 4, "stopped"),
        ("just goes", 3, "max_steps"),
        ("nohup", 3, "max_steps"),
    ],
)
def test_a_terminal_that_is_lost(how, status, reason, tmp_path):
    """Invariant: with a SIGHUP, before it is gone or because of it, the run saves and leaves; else it goes on."""
    terminal, theirs = pty.openpty()
    command = ["nohup"] * (how == "nohup") + words(max_steps=6 if status == 3 else 1000)
    environ = environment(TERM="xterm", OMP_NUM_THREADS="1")

    def in_its_session():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # this suite itself may run under nohup
        if how in ("hangs up", "nohup"):
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)  # its terminal's end is told

    with subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=in_its_session,
    ) as program:  # fmt: skip
        os.close(theirs)
        try:
            wait_for(has_trained(tmp_path), program)
            if how == "says so first":
                program.send_signal(signal.SIGHUP)
            os.close(terminal)
            assert program.wait(timeout=200) == status
        finally:
            program.kill()
    told = report(tmp_path / "out")
    assert told["exit_reason"] == reason
    assert newest_intact(tmp_path / "out")[0].step == told["steps"]


@pytest.mark.slow
def test_a_stop_before_the_first_step_loses_nothing(tmp_path, uninterrupted):
    """Invariant: a scheduler's signal during the imports is remembered; the run then begins as if never started."""
    program = start(tmp_path)
    wait_for(lambda: catches(program, signal.SIGUSR1), program)  # torch, which takes seconds, is being imported now
    program.send_signal(signal.SIGUSR1)
    assert program.wait(timeout=200) == 4
    assert report(tmp_path / "out")["exit_reason"] == "stopped"
    assert go(tmp_path).returncode == 0
    assert_same(tmp_path, uninterrupted("single"))


@pytest.mark.slow
def test_an_average_ripens_over_a_stop(tmp_path):
    """Reference: a run that was not stopped, bit for bit; of that one, a schedule that is fed with its rows' losses.

    The rate falls meanwhile, and must fall as if there had been no stop.
    It is stopped while the average ripens: 0.93 ** 20 is the first power below a quarter, so that takes 21 steps.
    """
    options = {"ema": 0.93, "log_every": 1, "target_loss": 0.37, "on_plateau": "decay"}
    (tmp_path / "whole").mkdir()
    assert go(tmp_path / "whole", **options).returncode == 0
    rows, told, _ = expected = outcome(tmp_path / "whole")
    plan = make_plan(TrainConfig(**(OPTIONS | options)), World.from_env())
    schedule = TrainState.of(plan.config, judged_windows=len(plan.dataset.judged), launched_at=0.0).schedule
    averaged = []
    for row in rows:
        schedule.observe(row["loss"])
        averaged += [row["step"]] * schedule.averaging
        assert schedule.due() == (row["full_pass_loss"] is not None), row["step"]
        if schedule.due():
            schedule.judged(row["full_pass_loss"])
    assert averaged[20] == told["steps"], "the loss was there sooner: the first pass that may be made ends the run"
    assert go(tmp_path, **options, max_steps=averaged[6]).returncode == 3
    assert go(tmp_path, **options).returncode == 0
    assert_same(tmp_path, expected)


@pytest.mark.slow
def test_a_stop_in_a_full_pass_of_the_average(tmp_path, uninterrupted):
    """Reference: the undisturbed run, bit for bit: ranks that hold parts of the weights put the whole ones back."""
    (tmp_path / "start.py").write_text(
        "import os, signal\n"
        "import train_overfit\n"
        "from nanogpt.training.evaluator import Evaluator\n"
        "before_part = Evaluator._before_part\n"
        "def stopping(self):\n"
        "    if self._average.mean: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    before_part(self)\n"
        "Evaluator._before_part = stopping\n"
        "train_overfit.main(train_overfit.run)\n"
    )
    options = flags(**(OPTIONS | ENGINES["sharded"][1]), out_dir="out")
    done = forked_ranks(2, tmp_path, tmp_path / "start.py", *options)
    assert report(tmp_path / "out")["exit_reason"] == "stopped", done.stdout + done.stderr
    assert done.returncode == 4
    assert re.search(r"asked to stop by SIGTERM at step (\d+): saving", done.stdout), done.stdout
    assert go(tmp_path, "sharded").returncode == 0
    assert_same(tmp_path, uninterrupted("sharded"))


@pytest.mark.slow
def test_a_stop_while_a_spent_budget_is_scored_leaves_it_spent(tmp_path, uninterrupted):
    """Reference: as above; the checkpoint of before the budget's own pass stays the newest."""
    program = start_forked(tmp_path, max_steps=10)
    wait_for(lambda: "scoring" in (tmp_path / "log").read_text(), program)
    program.terminate()
    assert program.wait(timeout=200) == 4
    assert go(tmp_path, max_steps=10).returncode == 3
    assert report(tmp_path / "out")["steps"] == 10
    assert go(tmp_path).returncode == 0
    assert_same(tmp_path, uninterrupted("single"))


@pytest.mark.slow
def test_a_stop_before_the_first_step_tells_where_the_run_stands(stopped, tmp_path):
    """Reference: the report of the attempt before, but for its scores, its clocks and what only an engine knows."""
    shutil.copytree(stopped / "out", tmp_path / "out")
    before = report(tmp_path / "out")
    program = start(tmp_path)
    wait_for(lambda: catches(program, signal.SIGUSR1), program)
    program.send_signal(signal.SIGUSR1)
    assert program.wait(timeout=200) == 4
    told = report(tmp_path / "out")
    assert (told["exit_reason"], told["reached"], told["loss"], told["steps"]) == ("stopped", False, None, 8)
    assert told["train_s"] >= newest_intact(tmp_path / "out")[0].progress["train_s"]
    others = ("exit_reason", "loss", "scores_precision", "peak_memory_bytes", *CLOCKS)
    assert {k: v for k, v in told.items() if not k.endswith(others)}.items() <= before.items()


@pytest.mark.parametrize("resume", ["never", slow("elsewhere"), slow("within")])
def test_the_command_that_began_a_run_goes_on_with_it(resume, stopped, tmp_path, forked, uninterrupted):
    """Reference: an undisturbed run. Begun by never, by a checkpoint elsewhere or by going back within out_dir.

    The checkpoint that it began from is gone by then, as keep_checkpoints would have it.
    """
    saved = tmp_path / "out" / "checkpoints"
    if resume == "within":
        shutil.copytree(stopped / "out", tmp_path / "out")
    source = {"never": None, "elsewhere": tmp_path / "step_00000004", "within": saved / "step_00000004"}[resume]
    if resume == "elsewhere":
        shutil.copytree(stopped / "out" / "checkpoints" / "step_00000004", source)
    options = {"resume": source or "never"}
    program = start_forked(tmp_path, **options)
    wait_for(has_trained(tmp_path, beyond=9), program)
    program.terminate()
    assert program.wait(timeout=200) == 4, (tmp_path / "log").read_text()
    assert ("renamed to abandoned_*: step_00000008" in (tmp_path / "log").read_text()) == (resume == "within")
    steps = report(tmp_path / "out")["steps"]
    if source:
        shutil.rmtree(source)
    done = go(tmp_path, **options)
    assert done.returncode == 0, done.stderr
    assert f"resumed from step_{steps:08d} of " in done.stdout
    assert ("name another --out_dir" in done.stdout) == (source is not None)
    if resume != "elsewhere":  # whose rows begin after step 4
        assert_same(tmp_path, uninterrupted("single"))
    assert outcome(tmp_path)[2] == uninterrupted("single")[2]
    before = contents(tmp_path)
    again = forked(tmp_path, TRAIN, *flags(**(OPTIONS | options), out_dir="out"))
    if resume == "never":  # what has ended is not gone on with by a command that is to begin
        assert (again.returncode, "already holds a run" in again.stderr) == (2, True)
    else:
        assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
    assert contents(tmp_path) == before


# The scores of so short a text take less time than a loaded machine may take to send a signal.
SLOW_SCORES = """
import time
import train_overfit
from nanogpt.training.evaluator import Evaluator

scorecard = Evaluator.scorecard
Evaluator.scorecard = lambda self, **asked: time.sleep(3) or scorecard(self, **asked)
train_overfit.main(train_overfit.run)
"""


@pytest.mark.slow
def test_a_stop_while_a_reached_target_is_scored(tmp_path, uninterrupted):
    """Reference: an undisturbed run: the scores are made when it is started again; after that it changes nothing.

    Meanwhile checkpoints were due by the clock, after each step, and as many are kept as was asked for.
    """
    options = {"checkpoint_minutes": 1e-6, "keep_checkpoints": 3}
    (tmp_path / "slow.py").write_text(SLOW_SCORES)
    program = start_forked(tmp_path, program=tmp_path / "slow.py", **options)
    wait_for(lambda: "scoring" in (tmp_path / "log").read_text(), program)
    program.terminate()
    assert program.wait(timeout=200) == 4
    assert go(tmp_path, **options).returncode == 0
    assert_same(tmp_path, uninterrupted("single"))
    kept = names(tmp_path / "out" / "checkpoints") - {"latest"}
    assert (len(kept), max(kept)) == (3, f"step_{report(tmp_path / 'out')['steps']:08d}")
    before = contents(tmp_path)
    done = go(tmp_path, **options)
    assert (done.returncode, "nothing to do" in done.stdout) == (0, True)
    assert contents(tmp_path) == before


def test_two_runs_do_not_share_a_directory(tmp_path):
    """Invariant: while one process writes a run directory another is refused, in one line."""
    first = start_forked(tmp_path)
    wait_for(has_trained(tmp_path), first)
    done = go(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "another run" in done.stderr
    first.terminate()
    assert first.wait(timeout=200) == 4
