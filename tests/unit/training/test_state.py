"""What a checkpoint holds of a run beside the tensors: all of it comes back, from older checkpoints too."""

import json
from dataclasses import fields
from math import inf, isnan, nan
from types import SimpleNamespace

import pytest

from nanogpt.config.train_config import TrainConfig
from nanogpt.evaluate.eval_schedule import EvalSchedule
from nanogpt.evaluate.evaluation import Evaluation
from nanogpt.storage.json_file import finite, parse_json
from nanogpt.training import state
from nanogpt.training.state import TrainState

CLOCKS = {"launched_at", "started_at"}
OF_THEIR_OWN = {"schedule", "meter"}  # with a state_dict each
HALF = TrainConfig(target_recall=0.5)


def begun():
    """A run as it begins."""
    return TrainState(EvalSchedule(0.099, 130, 16, averages_below=0.8, ripe_steps=47), launched_at=0.0)


def under_way():
    """A run of which nothing is as it began."""
    run = begun()
    for loss in (3.0, 0.5, 0.2):
        run.schedule.observe(loss)
        run.meter.add(loss * 1024, 1024, 1.5)
    run.schedule.judged(0.15)
    run.schedule.looked(0.1)
    run.step, run.bad_steps, run.bad_steps_in_a_row, run.step_is_unfinished = 5, 2, 1, True
    run.full_pass_s, run.other_device_s, run.lr, run.grad_norm = 1.25, -3.5, 6e-4, 0.7
    run.awaits_recall, run.missed, run.history = True, (3, 40), [(2, 3.0), (5, 0.35)]
    run.verified = Evaluation(0.098, 0.75, by_heart=True)
    return run


def stored(run, ranks=1):
    """Its progress as a checkpoint on the disk gives it back."""
    return parse_json(json.dumps(finite(run.state_dict() | {"world_size": ranks}), allow_nan=False))


def test_all_of_it_comes_back():
    """Invariant: every field, of the type that it had; so a field that is new and not saved is found here."""
    before, fresh, after = under_way(), begun(), begun()
    after.load_state_dict(stored(before), ranks=1)
    for name in (field.name for field in fields(TrainState) if field.name not in CLOCKS):
        saved, read, first = (getattr(run, name) for run in (before, after, fresh))
        if name in OF_THEIR_OWN:
            saved, read, first = (each.state_dict() for each in (saved, read, first))
        assert saved != first, f"{name} is as it was in the beginning: nothing is shown of it"
        assert (read, type(read)) == (saved, type(saved)), name
    assert [type(row) for row in after.history] == [tuple, tuple]


@pytest.mark.parametrize("figure", [nan, inf, -inf])
def test_figures_that_are_not_finite_come_back_as_none(figure):
    """Invariant: strict JSON holds a step that was refused; its rate and norm are NaN again, not null."""
    before, after = under_way(), begun()
    before.lr = before.grad_norm = figure
    after.load_state_dict(stored(before), ranks=1)
    assert isnan(after.lr)
    assert isnan(after.grad_norm)
    assert after.state_dict().keys() == before.state_dict().keys()


def test_a_checkpoint_that_knows_no_recall():
    """Invariant: from one of before --target_recall the loss is verified still, and a recall is yet to be found."""
    saved = stored(under_way())
    for name in ("awaits_recall", "missed", "verified_recall", "verified_by_heart"):
        del saved[name]
    after = begun()
    after.load_state_dict(saved, ranks=1)
    assert (after.awaits_recall, after.missed, after.verified) == (False, (), Evaluation(0.098))
    assert after.verified.reaches(TrainConfig())
    assert not after.verified.reaches(HALF)
    none = begun()
    none.load_state_dict(saved | {"verified_loss": None}, ranks=1)
    assert none.verified is None


def test_clocks_go_on_over_attempts(monkeypatch):
    """Reference: three attempts of 100, 50 and 10 s on 4, 2 and 3 ranks, written out, with hours between them.

    A clock that counts from the start of its machine may stand at less in a later attempt.
    """
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(state, "time", SimpleNamespace(perf_counter=lambda: now.s))

    def attempt(saved, ranks):
        """Launched 5 s before it trains; each process's clock begins anywhere."""
        run = TrainState(EvalSchedule(0.099, 130, 16), launched_at=now.s - 5, started_at=now.s)
        if saved:
            run.load_state_dict(saved, ranks=ranks)
        return run

    def told(run, ranks):
        return run.train_s, run.launch_s, run.train_s * ranks + run.other_device_s

    run = attempt(None, 4)
    now.s += 100
    assert told(run, 4) == (100, 105, 400)
    saved = stored(run, ranks=4)
    now.s = 3.0  # another machine, which has just been started
    run = attempt(saved, 2)
    assert told(run, 2) == (100, 110, 400), "nothing has been trained yet"
    now.s += 50
    assert told(run, 2) == (150, 160, 500)
    saved = stored(run, ranks=2)
    now.s += 10_000
    run = attempt(saved, 3)
    now.s += 10
    assert told(run, 3) == (160, 175, 530)
