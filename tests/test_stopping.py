"""The schedule of full passes: within its budget, in time, and the same on every rank."""

from itertools import pairwise

import pytest

from nanogpt.eta import steps_to_target
from nanogpt.stopping import BUDGET, MEMORY, WORTHWHILE, PassSchedule


def falling(step):
    """A loss that falls from 5 and bends to 0.05."""
    return 0.05 + 5 * 0.97**step


def play(losses, target=0.099, windows=130, batch_size=16, lag=0.8):
    """Steps at which passes were made, each finding `lag` times the step's loss."""
    schedule, passes = PassSchedule(target, windows, batch_size), []
    for step, loss in enumerate(losses, start=1):
        schedule.observe(loss)
        if schedule.due():
            passes.append(step)
            schedule.judged(lag * loss)
    return passes


def test_no_pass_while_the_target_is_far():
    """Invariant: above WORTHWHILE times the target no pass is made, below it one is."""
    assert play([1.01 * WORTHWHILE * 0.099] * 500) == []
    assert play([0.99 * WORTHWHILE * 0.099] * 500) != []


def test_the_first_pass_comes_before_the_training_loss_is_there():
    """Invariant: training losses lag behind a full pass, so the first pass comes while they are still above target."""
    first = play([falling(step) for step in range(400)])[0]
    assert 0.099 < falling(first) < 0.16


@pytest.mark.parametrize("windows", [10, 130, 4000, 20_000])
@pytest.mark.parametrize("lag", [0.5, 1.0, 1.4])
def test_passes_stay_within_the_budget(windows, lag):
    """Invariant: at no time have passes cost more than their share of the training steps."""
    for hovering in (0.1, 0.12):
        passes = play([hovering] * 3000, windows=windows, lag=lag)
        cost = PassSchedule(0.099, windows, 16).cost_steps
        assert all((i + 1) * cost <= BUDGET * step for i, step in enumerate(passes))


def test_a_run_that_has_reached_it_is_judged_soon():
    """Invariant: a loss that drops to half the target is judged as soon as the mean of the last steps shows it."""
    passes = play([0.5] * 300 + [0.05] * 60)
    expected = next(n for n in range(60) if 0.05 + 0.45 * MEMORY**n <= WORTHWHILE * 0.099)
    assert passes[0] == 300 + expected


def test_a_misleading_pass_is_not_believed_for_long():
    """Invariant: near the target a pass is made every four costs, even where the last one foretold failure."""
    passes = play([0.12] * 2000, lag=1.4)
    assert len(passes) > 20
    assert min(b - a for a, b in pairwise(passes)) >= 4 * PassSchedule(0.099, 130, 16).cost_steps


def test_an_exponential_is_foreseen():
    """Reference: a loss that halves every 10 steps; the interval holds the truth, the log-linear end is exact."""
    history = [(step, 4 * 0.5 ** (step / 10)) for step in range(0, 40, 4)]
    true = 10 * 5.336 - 36  # log2(4 / 0.099) x 10 is where it crosses
    eta = steps_to_target(history, 0.099)
    assert eta.high == pytest.approx(true, rel=1e-3)
    assert eta.low < eta.steps < eta.high


def test_no_eta_without_a_fall():
    """Invariant: too few points, a plateau or a rise give no ETA; a reached target gives 0."""
    assert steps_to_target([(1, 5.0), (2, 4.0)], 0.099) is None
    assert steps_to_target([(i, 2.0) for i in range(20)], 0.099) is None
    assert steps_to_target([(i, 2.0 + 0.1 * i) for i in range(20)], 0.099) is None
    assert steps_to_target([(i, 1 / (i + 1)) for i in range(20)], 0.099).steps == 0
