"""Whose run goes on, from which checkpoint and in which shape, as if nothing had happened: rows, report and weights."""

import json
import os
import shutil

import pytest

from harness.forks import forked_ranks
from harness.lanes import slow
from harness.resuming import (
    ENGINES,
    OPTIONS,
    assert_same,
    contents,
    go,
    outcome,
)
from harness.runs import SHORT, TRAIN, flags, metrics, report
from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.storage.checkpoint import newest_intact
from nanogpt.storage.resume import find_start


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


@pytest.mark.slow
def test_another_shape_follows_the_same_curve(tmp_path, uninterrupted):
    """Reference: one process throughout. Rounding grew to 5e-7 of a loss and 1.7e-6 of a norm when measured.

    The norm follows the weights to first order, the loss near its minimum to second. device_s counts the ranks that
    each attempt had.
    """
    train_s = device_s = 0.0  # of the newest checkpoint
    shapes = [
        ("single", 4), ("zero 2", 8), ("sharded on 3", 11), ("ddp", 14), ("sharded", 17), ("zero 3 on 4", 20),
        ("zero 1", 23), ("single", 100),
    ]  # fmt: skip
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


@pytest.mark.slow
def test_muon_goes_on_in_another_shape(tmp_path):
    """Reference: one process throughout, Muon's momentum cut and joined on the way, to 1e-5 as above."""
    (tmp_path / "whole").mkdir()
    assert go(tmp_path / "whole", recipe="fast", max_steps=9).returncode == 3
    for engine, max_steps in (("single", 3), ("zero 2", 5), ("ddp", 9)):
        go(tmp_path, engine, recipe="fast", max_steps=max_steps)
    rows, expected = metrics(tmp_path / "out"), metrics(tmp_path / "whole" / "out")
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [3, 6, 9]
    for row, wanted in zip(rows, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-5), (row["step"], key)
    assert report(tmp_path / "out")["optimizer"] == "muon"


@pytest.mark.slow
def test_three_ranks_of_ddp_go_on_bit_for_bit(tmp_path):
    """Reference: the same steps without a stop. Of three ranks a sum depends on its order, and that on DDP's buckets.

    The widths are such that a model has several, whose layout DDP changes after its first backward.
    """
    options = SHORT | {"dtype": "fp32", "n_embd": 48, "log_every": 1, "engine": "ddp", "wandb": "disabled"}
    for out_dir, max_steps in (("whole", 6), ("out", 3), ("out", 6)):
        done = forked_ranks(3, tmp_path, TRAIN, *flags(**options, max_steps=max_steps, out_dir=out_dir))
        assert done.returncode == 3, done.stderr
    rows = [[(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / name)] for name in ("out", "whole")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6


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


@pytest.mark.slow
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


@pytest.mark.parametrize("dtype", [slow("bf16"), "fp32"])
def test_another_machine_goes_on_in_the_runs_own_dtype(dtype, tmp_path):
    """Invariant: whichever of the two is faster here, --dtype=auto is that of the run in out_dir."""
    small = {"n_layer": 1, "n_embd": 16}  # a CPU with AVX2 alone emulates bf16
    assert go(tmp_path, **small, dtype=dtype, max_steps=2).returncode == 3
    assert go(tmp_path, **small, dtype="auto", max_steps=4).returncode == 3
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
