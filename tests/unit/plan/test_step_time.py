"""What is foretold of time, against recorded runs and against steps that are taken."""

import json
import os
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from harness.forks import forked
from harness.runs import ALONE, REPOSITORY, TINY, flags
from nanogpt.config.train_config import TrainConfig
from nanogpt.plan import step_time as forecast
from nanogpt.plan.plan import make_plan
from nanogpt.plan.reference_runs import ReferenceRun, comparable_runs, read_record, steps_on_record
from nanogpt.plan.step_time import step_seconds

RECORDED = read_record().runs
NAMES = [f.name for f in fields(ReferenceRun) if f.name not in ("source", "curve")]


def _figures(run):
    return {name: getattr(run, name) for name in NAMES}


def test_the_record_is_that_of_the_curves():
    """Reference: the first line of each recorded curve that was trained as the program trains."""
    found = set()
    for path in (REPOSITORY / "benchmarks" / "curves").glob("*.jsonl"):
        about = json.loads(path.read_text().splitlines()[0])
        options = about["options"]
        usual = (about["exit_reason"], *(options[name] for name in ("phase", "target_loss", "on_plateau", "ema")))
        if "optimizer" in options and usual == ("target_reached", "random", 0.099, "decay", 0.97):
            found.add((*(options[name] for name in NAMES[:7]), about["floor"], about["steps"]))
    assert found == {tuple(_figures(recorded).values()) for recorded in RECORDED}
    assert len(RECORDED) == len(found)


def test_what_is_on_record_is_forecast_and_no_more():
    """Invariant: every recorded run lies within its own forecast; outside what was recorded nothing is said."""
    for recorded in RECORDED:
        options = {name: value for name, value in _figures(recorded).items() if name not in ("floor", "steps")}
        low, high = steps_on_record(make_plan(TrainConfig(n_head=4, **options), ALONE).config, recorded.floor)
        assert low - 1 <= recorded.steps <= high + 1
    config = make_plan(TrainConfig(), ALONE).config
    assert isinstance(steps_on_record(config, 0.036), tuple)
    for changes, why in (
        ({"phase": "fixed"}, "--phase=fixed"),
        ({"ema": 0.0}, "--ema=0"),
        ({"target_loss": 0.2}, "--target_loss=0.2"),
        ({"learning_rate": 0.1}, "--learning_rate=0.1 is outside"),
        ({"learning_rate": 3e-3}, "--learning_rate=0.003 is above that of any reference run for --n_embd=768"),
        ({"optimizer": "muon", "learning_rate": 6e-4}, "--learning_rate=0.0006 is outside the 0.001 to"),
        ({"subset_tokens": 338_025}, "--subset_tokens=338025 is outside"),
    ):
        assert why in steps_on_record(TrainConfig(**(vars(config) | changes)), 0.036)
    assert "floor" in steps_on_record(config, 0.09)


def test_the_curve_on_record_is_that_of_the_run():
    """Reference: its losses, ten steps averaged: below from the step on record on, and not at the one before."""
    (recorded,) = [run for run in RECORDED if run.source == "benchmarks/curves/adamw-wide.jsonl"]
    losses = np.array([json.loads(line)["loss"] for line in (REPOSITORY / recorded.source).open().readlines()[1:]])
    means = [losses[max(0, i - 10) : i].mean() for i in range(1, len(losses) + 1)]  # an epoch is two steps
    for loss, step in recorded.curve:
        assert max(means[step - 1 :]) <= loss
        assert step == 1 or means[step - 2] > loss
    assert recorded.step_below(recorded.curve[3][0]) == recorded.curve[3][1]
    assert recorded.step_below(20.0) is recorded.step_below(0.01) is None


def test_runs_are_compared_with_their_like():
    """Invariant: with those of their optimizer; with none outside what is on record."""
    config = make_plan(TrainConfig(), ALONE).config
    for optimizer in ("adamw", "muon"):
        resolved = make_plan(TrainConfig(optimizer=optimizer), ALONE).config
        alike = comparable_runs(resolved, 0.036)
        assert {run.optimizer for run in alike} == {optimizer}
        assert len(alike) >= 7
    for changes in ({"phase": "fixed"}, {"on_plateau": "none"}, {"target_loss": 0.2}, {"subset_tokens": 4096}):
        assert comparable_runs(replace(config, **changes), 0.036) == ()
    assert comparable_runs(config, 0.09) == ()


def test_a_step_is_scaled_by_depth(monkeypatch):
    """Reference: by hand, from clocks that are made up; how near it comes to real steps is measured, not tested.

    The head takes 3 s forward and backward and 1 s to update, each block 0.5 s and 0.25 s: 16 of them, on half the
    batch in two micro-batches, 2 x (3 + 8) + 1 + 4 s; as often as there are ranks for each core.
    """
    seen = []

    def timed(config, n_layer, world, *, graphed):
        assert not graphed, "there are several ranks"
        seen.append((n_layer, config.micro_batch_size))
        return 3 + 0.5 * n_layer, 1 + 0.25 * n_layer

    monkeypatch.setattr(forecast, "_timed", timed)
    config = make_plan(TrainConfig(dtype="fp32", micro_batch_size=4), ALONE).config
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert step_seconds(config, replace(ALONE, size=2)) == 27
    assert torch.get_num_threads() == threads
    assert seen == [(0, 4), (2, 4)]
    config = replace(config, micro_batch_size=2)
    assert step_seconds(config, replace(ALONE, size=8)) == 4 * (11 + 5)


def test_real_clocks_run():
    """Invariant: a step of a deeper model is timed on this device, and takes time."""
    config = make_plan(
        TrainConfig(n_layer=3, n_head=2, n_embd=16, dtype="fp32", batch_size=1, recipe="fast"), ALONE
    ).config
    assert step_seconds(config, ALONE) > 0


def test_the_command(tmp_path, forked):
    """Reference: read by eye; every engine of two ranks, nothing written; strict refuses, status 2, in one line."""
    done = forked(tmp_path, "nanogpt", "preflight", "--ranks=2", *flags(**TINY, dtype="fp32"))
    assert done.returncode == 0, done.stderr
    assert "256 tokens of builtin in 224 different windows of 32 tokens: entropy floor 0.0" in done.stdout
    assert "step time: about " in done.stdout
    assert "time to target: unknown: --subset_tokens=256 is outside the 512 to 2048" in done.stdout
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| ddp", "| ZeRO"))]
    assert [row[0] for row in rows] == ["| ddp", "| ZeRO 0", "| ZeRO 1", "| ZeRO 2", "| ZeRO 3"]
    for row in rows:
        *parts, total = (float(figure.rstrip(" |")) for figure in row[1:])
        assert total == pytest.approx(sum(parts), abs=0.06)
    for words, line in (
        (["--target_loss=0.001", "--preflight=strict"], "error: --preflight=strict: --target_loss=0.001 is below"),
        (["--ranks=0"], "error: --ranks=0 must be a positive number"),
        (["--ranks=32"], "error: --batch_size=16 leaves some of the 32 ranks"),
    ):
        done = forked(tmp_path, "nanogpt", "preflight", *words, *flags(**TINY))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_the_whole_of_tiny_shakespeare(tiny_shakespeare, tmp_path):
    """Reference: the known floor of every offset; a context, a grid and a subset are named that would do."""
    words = flags(**TINY | {"subset_tokens": 338_025, "context_length": 64}, data=tiny_shakespeare, dtype="fp32")
    done = forked(tmp_path, "nanogpt", "preflight", *words)
    assert "entropy floor 0.1002, target 0.099" in done.stdout, done.stderr
    assert "--context_length=136 (floor 0.0472), --phase=fixed (floor 0.0421), --subset_tokens=7700" in done.stdout
    assert "time to target: never" in done.stdout
