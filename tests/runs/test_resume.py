"""A run that is stopped or killed, at any moment, goes on as if nothing had happened: rows, report and weights.

Signals, kills, damaged files and the file-size limit are real.
"""

import fcntl
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest

from harness.resuming import (
    CLOCKS,
    ENGINES,
    OPTIONS,
    assert_same,
    catches,
    contents,
    go,
    has_trained,
    kill,
    names,
    outcome,
    start,
    words,
    workers,
)
from harness.runs import TRAIN, WORKERS, environment, flags, metrics, report, run, wait_for
from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.plan.plan import make_plan
from nanogpt.storage.checkpoint import newest_intact
from nanogpt.storage.resume import find_start
from nanogpt.training.state import TrainState


@pytest.fixture
def refused(forked, tmp_path):
    """refused(OPTIONS) is the line that a run in tmp_path is refused in: exit status 2, and nothing touched."""

    def of(**options):
        before = contents(tmp_path)
        done = forked(tmp_path, TRAIN, *flags(**(OPTIONS | options), out_dir="out"))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert contents(tmp_path) == before
        return done.stderr

    return of


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """outcome() of a run of each engine that nobody disturbed, when first asked for."""
    known = {}

    def of(engine):
        if engine not in known:
            cwd = tmp_path_factory.mktemp("uninterrupted")
            done = go(cwd, engine)
            assert done.returncode == 0, done.stderr
            known[engine] = outcome(cwd)
        return known[engine]

    return of


def test_asked_to_stop_it_saves_and_goes_on(tmp_path, uninterrupted):
    """Reference: a run that was not stopped: the same rows, report and weights, bit for bit. Exit status 4 each."""
    steps = 0
    for how in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "STOP"):
        program = start(tmp_path)
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


@pytest.mark.parametrize("engine", ["ddp", "zero 2", "zero 3"])
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


def test_a_stop_before_the_first_step_loses_nothing(tmp_path, uninterrupted):
    """Invariant: a scheduler's signal during the imports is remembered; the run then begins as if never started."""
    program = start(tmp_path)
    wait_for(lambda: catches(program, signal.SIGUSR1), program)  # torch, which takes seconds, is being imported now
    program.send_signal(signal.SIGUSR1)
    assert program.wait(timeout=200) == 4
    assert report(tmp_path / "out")["exit_reason"] == "stopped"
    assert go(tmp_path).returncode == 0
    assert_same(tmp_path, uninterrupted("single"))


@pytest.mark.parametrize(("engine", "planned"), [("single", 10), ("ddp", 5), ("zero 2", 5)])
def test_killed_again_and_again_it_ends_the_same(engine, planned, tmp_path, uninterrupted):
    """Reference: an undisturbed run, bit for bit. SIGKILL at random moments, a save every step, so in saves too."""
    moments = random.Random(0)
    kills, saved = 0, tmp_path / "out" / "checkpoints"
    while kills < planned:
        before = names(saved)
        program = start(tmp_path, engine, checkpoint_every=1, log_every=1)
        wait_for(lambda before=before: names(saved) != before, program)
        time.sleep(moments.uniform(0.0, 0.25))
        if program.poll() is not None:
            break
        kill(program)
        kills += 1
    assert 2 * kills >= planned, "the run was over too soon to be killed often"
    assert go(tmp_path, engine, checkpoint_every=1, log_every=1).returncode == 0
    rows, told, weights = outcome(tmp_path)
    expected_rows, expected_told, expected_weights = uninterrupted(engine)
    assert [row["step"] for row in rows] == list(range(1, told["steps"] + 1)), "each step once"
    assert (told, weights) == (expected_told, expected_weights)
    losses = {row["step"]: row["full_pass_loss"] for row in rows}
    assert all(losses[row["step"]] == row["full_pass_loss"] for row in expected_rows)


def test_another_shape_follows_the_same_curve(tmp_path, uninterrupted):
    """Reference: one process throughout. Rounding grew to 5e-7 of a loss and 1.7e-6 of a norm when measured.

    The norm follows the weights to first order, the loss near its minimum to second. device_s counts the ranks that
    each attempt had.
    """
    train_s = device_s = 0.0  # of the newest checkpoint
    shapes = [("single", 4), ("zero 2", 8), ("ddp", 14), ("zero 3 on 4", 20), ("zero 1", 22), ("single", 100)]
    for engine, max_steps in shapes:
        done = go(tmp_path, engine, max_steps=max_steps)
        ranks, told = ENGINES[engine][0], report(tmp_path / "out")
        assert told["device_s"] == pytest.approx(device_s + (told["train_s"] - train_s) * ranks)
        saved = newest_intact(tmp_path / "out")[0].progress
        train_s, device_s = saved["train_s"], device_s + (saved["train_s"] - train_s) * ranks
    assert done.returncode == 0, done.stderr
    rows, told, _ = outcome(tmp_path)
    expected_rows, expected, _ = uninterrupted("single")
    assert told["loss"] == pytest.approx(expected["loss"], rel=3e-6)
    assert told["steps"] == expected["steps"]
    for row, wanted in zip(rows, expected_rows, strict=True):
        for key, rel in (("loss", 3e-6), ("grad_norm", 1e-5), ("full_pass_loss", 3e-6)):
            same = row[key] is None if wanted[key] is None else row[key] == pytest.approx(wanted[key], rel=rel)
            assert same, (row["step"], key, row[key], wanted[key])


def test_muon_goes_on_in_another_shape(tmp_path):
    """Reference: one process throughout, Muon's momentum cut and joined on the way, to 1e-5 as above."""
    (tmp_path / "whole").mkdir()
    assert go(tmp_path / "whole", recipe="fast", max_steps=9).returncode == 3
    for engine, max_steps in (("single", 3), ("zero 2", 5), ("ddp", 7), ("single", 9)):
        go(tmp_path, engine, recipe="fast", max_steps=max_steps)
    rows, expected = metrics(tmp_path / "out"), metrics(tmp_path / "whole" / "out")
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [3, 6, 9]
    for row, wanted in zip(rows, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-5), (row["step"], key)
    assert report(tmp_path / "out")["optimizer"] == "muon"


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


def test_a_larger_budget_goes_on(tmp_path, uninterrupted):
    """Reference: a run with that budget from the start; a spent budget leaves nothing that shows later."""
    assert go(tmp_path, max_steps=10).returncode == 3
    before = contents(tmp_path)
    again = go(tmp_path, max_steps=10)
    assert (again.returncode, "has spent its --max_steps already" in again.stdout) == (3, True)
    assert contents(tmp_path) == before
    assert report(tmp_path / "out")["steps"] == 10
    assert go(tmp_path).returncode == 0
    assert_same(tmp_path, uninterrupted("single"))


def test_a_budget_that_ends_with_a_pass_is_spent_once(tmp_path):
    """Reference: a run with a larger budget; of this one the last step is one at which a pass is due anyway."""
    options = {"ema": 0.9, "log_every": 1}
    (tmp_path / "whole").mkdir()
    assert go(tmp_path / "whole", **options).returncode == 0
    expected = outcome(tmp_path / "whole")
    first, *_, last = (row["step"] for row in expected[0] if row["full_pass_loss"] is not None)
    assert first < last
    for _ in range(2):
        assert go(tmp_path, **options, max_steps=first).returncode == 3
        assert report(tmp_path / "out")["steps"] == first
    assert go(tmp_path, **options).returncode == 0
    assert_same(tmp_path, expected)


def test_a_stop_while_a_spent_budget_is_scored_leaves_it_spent(tmp_path, uninterrupted):
    """Reference: as above; the checkpoint of before the budget's own pass stays the newest."""
    program = start(tmp_path, max_steps=10)
    wait_for(lambda: "scoring" in (tmp_path / "log").read_text(), program)
    program.terminate()
    assert program.wait(timeout=200) == 4
    assert go(tmp_path, max_steps=10).returncode == 3
    assert report(tmp_path / "out")["steps"] == 10
    assert go(tmp_path).returncode == 0
    assert_same(tmp_path, uninterrupted("single"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The directory of a run of 8 steps, with checkpoints of steps 4 and 8."""
    cwd = tmp_path_factory.mktemp("stopped")
    assert go(cwd, max_steps=8, checkpoint_every=4).returncode == 3
    assert sorted(os.listdir(cwd / "out" / "checkpoints")) == ["latest", "step_00000004", "step_00000008"]
    return cwd


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


def test_a_damaged_checkpoint_is_passed_over(stopped, tmp_path, uninterrupted):
    """Reference: an undisturbed run; the warning names what was skipped. A damaged row of metrics.jsonl is dropped."""
    shutil.copytree(stopped / "out", tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "step_00000008" / "rank_00000.safetensors").write_bytes(b"")
    with (tmp_path / "out" / "metrics.jsonl").open("ab") as rows:
        rows.write(b"\xff, not even text\n")
    done = go(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: step_00000008 rank_00000.safetensors is damaged: skipped" in done.stdout
    assert "resumed from step_00000004" in done.stdout
    assert_same(tmp_path, uninterrupted("single"))


def test_without_an_intact_one_it_is_refused(stopped, tmp_path, refused):
    """Invariant: what might be mended is not trained over."""
    shutil.copytree(stopped / "out", tmp_path / "out")
    for step in (4, 8):
        (tmp_path / "out" / "checkpoints" / f"step_0000000{step}" / "manifest.json").unlink()
    assert "no intact checkpoint" in refused()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"learning_rate": 1e-4, "seed": 5},
            [f"--learning_rate=0.0001 (it had {OPTIONS['learning_rate']:g})", "--seed=5 (it had 0)"],
        ),
        ({"data": "text.txt"}, ["--data=", "another text"]),
        ({"resume": "never"}, ["already holds a run"]),
        ({"resume": "nowhere"}, ["--resume=nowhere"]),
    ],
)
def test_another_run_is_refused(stopped, tmp_path, refused, options, said):
    """Invariant: each option that differs is named."""
    shutil.copytree(stopped / "out", tmp_path / "out")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 50)
    line = refused(**options)
    for part in said:
        assert part in line


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_another_machine_goes_on_in_the_runs_own_dtype(dtype, tmp_path):
    """Invariant: whichever of the two is faster here, --dtype=auto is that of the run in out_dir."""
    assert go(tmp_path, dtype=dtype, max_steps=2).returncode == 3
    assert go(tmp_path, dtype="auto", max_steps=4).returncode == 3
    told = report(tmp_path / "out")
    assert (told["dtype"], told["steps"]) == (dtype, 4)


def test_never_does_not_begin_among_old_checkpoints(stopped, tmp_path, refused):
    """Invariant: the old ones would be kept in place of the new run's, as they are of later steps."""
    shutil.copytree(stopped / "out" / "checkpoints", tmp_path / "out" / "checkpoints")
    assert "holds checkpoints" in refused(resume="never")
    assert os.listdir(tmp_path / "out") == ["checkpoints"]


def test_must_needs_a_checkpoint(tmp_path, refused):
    """Invariant: --resume=must does not begin afresh."""
    refused(resume="must")
    assert not (tmp_path / "out").exists()


def test_a_named_checkpoint_goes_on_elsewhere(stopped, tmp_path, uninterrupted):
    """Reference: an undisturbed run's last step; a new directory holds the rows from there on."""
    checkpoint = stopped / "out" / "checkpoints" / "step_00000004"
    assert go(tmp_path, resume=checkpoint).returncode == 0
    assert outcome(tmp_path)[2] == uninterrupted("single")[2]
    assert metrics(tmp_path / "out")[0]["step"] == 6


@pytest.mark.parametrize("resume", ["never", "elsewhere", "within"])
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
    program = start(tmp_path, **options)
    wait_for(has_trained(tmp_path, beyond=9), program)
    program.terminate()
    assert program.wait(timeout=200) == 4, (tmp_path / "log").read_text()
    assert ("set aside as abandoned_*: step_00000008" in (tmp_path / "log").read_text()) == (resume == "within")
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


@pytest.mark.parametrize(
    ("resume", "begun_with", "reason", "saved", "begins"),
    [
        ("never", "never", None, [], "afresh"),  # killed before its first checkpoint
        ("auto", "never", None, [], "afresh"),
        ("named", "named", "stopped", [], "named"),
        ("auto", "named", None, [], "named"),
        ("must", "named", None, [4], "step_00000004"),
        ("must", "named", None, [], "has no checkpoint"),
        ("never", "auto", None, [4], "already holds a run"),
        ("never", "never", "max_steps", [4], "step_00000004"),
        ("never", "never", "target_reached", [4], "already holds a run"),
        ("never", "named", None, [], "already holds a run"),
        ("named", "auto", "stopped", [], "already holds a run"),
        ("named", "never", None, [4], "already holds a run"),
    ],
)
def test_whose_run_goes_on(resume, begun_with, reason, saved, begins, stopped, tmp_path):
    """Invariant: a command begins as its run began, goes on with that alone; auto and must go on with any run."""
    named, out_dir = stopped / "out" / "checkpoints" / "step_00000008", tmp_path / "out"
    values = {"named": str(named)}
    out_dir.mkdir()
    before = {"begun_with": values.get(begun_with, begun_with), "wandb_run_id": "before"}
    (out_dir / "config.json").write_text(json.dumps(before))
    if reason:
        (out_dir / "report.json").write_text(json.dumps({"exit_reason": reason}))
    for step in saved:
        shutil.copytree(named.with_name(f"step_{step:08d}"), out_dir / "checkpoints" / f"step_{step:08d}")
    config = json.loads((stopped / "out" / "config.json").read_text())["config"]
    config = TrainConfig(**config | {"resume": values.get(resume, resume), "out_dir": str(out_dir)})
    corpus_sha256 = report(stopped / "out")["corpus_sha256"]
    if " " in begins:
        with pytest.raises(ConfigError, match=begins):
            find_start(config, corpus_sha256)
        return
    begun = find_start(config, corpus_sha256)
    at = {"afresh": None, "named": named, "step_00000004": out_dir / "checkpoints" / "step_00000004"}[begins]
    assert (begun.checkpoint, begun.fresh, begun.begun_with) == (at, False, before["begun_with"])
    assert begun.wandb_run_id == (newest_intact(out_dir)[0].progress["wandb_run_id"] if saved else "before")


def test_a_stop_while_a_reached_target_is_scored(tmp_path, uninterrupted):
    """Reference: an undisturbed run: the scores are made when it is started again; after that it changes nothing.

    Meanwhile checkpoints were due by the clock, after each step, and as many are kept as was asked for.
    """
    options = {"checkpoint_minutes": 1e-6, "keep_checkpoints": 3}
    program = start(tmp_path, **options)
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
    first = start(tmp_path)
    wait_for(has_trained(tmp_path), first)
    done = go(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "another run" in done.stderr
    first.terminate()
    assert first.wait(timeout=200) == 4


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


@pytest.mark.parametrize("engine", ["single", "ddp", "zero 2"])
def test_a_full_disk_does_not_end_the_run(engine, tmp_path):
    """Invariant: a checkpoint that cannot be written is warned of; the run goes on, and the one before stays usable."""
    slow = {"learning_rate": 1e-5}  # no target within the test
    spent = 3 if engine == "single" else 1  # torchrun's own status for a worker's 3
    assert go(tmp_path, engine, **slow, max_steps=4).returncode == spent
    program = start(tmp_path, engine, limited, **slow, checkpoint_every=2, max_minutes=15)
    try:
        wait_for(lambda: (tmp_path / "log").read_text().count("warning: no checkpoint could be saved") >= 2, program)
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
    assert done.returncode == spent
    assert "resumed from step_00000004" in done.stdout
    assert report(tmp_path / "out")["steps"] == 8


def test_a_restarted_group_does_not_look_for_the_dead(tmp_path):
    """Invariant: a rank that is back first waits for its peer, though torchrun's store still has the old address."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    done = run(*launcher, WORKERS / "restart_worker.py", cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, "restarted True, 2 ranks met\n"), done.stderr


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


def test_torchrun_brings_a_killed_worker_back(tmp_path, uninterrupted):
    """Reference: two undisturbed DDP ranks, bit for bit: torchrun --max_restarts starts the group again by itself.

    With --resume=never, by which the first group began the run that the second one goes on with.
    """
    options = flags(**OPTIONS, checkpoint_every=2, out_dir="out", resume="never")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3"]
    env = environment(OMP_NUM_THREADS="1")
    with (tmp_path / "log").open("w") as log:
        program = subprocess.Popen([*launcher, TRAIN, *options], cwd=tmp_path, env=env, stdout=log, stderr=log)
    wait_for(lambda: list((tmp_path / "out" / "checkpoints").glob("step_*")), program)
    os.kill(workers(program)[-1], signal.SIGKILL)
    assert program.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    assert "resumed from step_" in (tmp_path / "log").read_text()
    assert_same(tmp_path, uninterrupted("ddp"))
