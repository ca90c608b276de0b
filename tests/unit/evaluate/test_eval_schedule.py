"""The schedule of full passes: within its budget, in time, and the same on every rank."""

from itertools import pairwise
from math import ceil

import pytest
import torch

from nanogpt.config.train_config import TrainConfig
from nanogpt.evaluate.eval_schedule import BUDGET, EARLY, EARLY_BUDGET, HOVERS, LEAST, MEMORY, WORTHWHILE, EvalSchedule
from nanogpt.optim.ema import EMA
from nanogpt.optim.recipe import resolve_recipe
from nanogpt.training.state import TrainState


def falling(step):
    """A loss that falls from 5 and bends to 0.05."""
    return 0.05 + 5 * 0.97**step


def play(losses, target=0.099, windows=130, batch_size=16, lag=0.8):
    """Steps at which passes were made, each finding `lag` times the step's loss."""
    schedule, passes = EvalSchedule(target, windows, batch_size), []
    for step, loss in enumerate(losses, start=1):
        schedule.observe(loss)
        if schedule.due():
            passes.append(step)
            schedule.judged(lag * loss)
    return passes


def test_no_pass_while_the_target_is_far():
    """Invariant: above HOVERS times the target no pass is made; below WORTHWHILE times one is, once affordable."""
    cost = EvalSchedule(0.099, 130, 16).cost_steps
    assert play([1.01 * HOVERS * 0.099] * 500) == []
    assert play([0.99 * WORTHWHILE * 0.099] * 500)[0] < cost / EARLY_BUDGET + 1


def test_a_loss_that_hovers_above_the_target_is_judged():
    """Invariant: between the two factors there is a pass each time that one is earned since the loss came so near."""
    earned = ceil(EvalSchedule(0.099, 130, 16).cost_steps / BUDGET)
    far, near = 1.2 * HOVERS * 0.099, 1.2 * WORTHWHILE * 0.099
    came = next(n for n in range(60) if near + (far - near) * MEMORY ** (n + 1) <= HOVERS * 0.099)
    assert play([far] * 300 + [near] * 3 * earned, lag=1.0) == [300 + came + earned * n for n in (1, 2)]
    assert play(([far] * 20 + [near] * (earned - 10)) * 9, lag=1.0) == []  # never near for so long


def test_hovering_spends_no_more_than_it_earns():
    """Invariant: after long hovering a run that reaches the target is judged as soon as one that came from far off."""
    for hovering in range(100, 400, 7):
        reached = 300 + hovering
        passes = play([0.5] * 300 + [2.2 * 0.099] * hovering + [0.05] * 60, lag=1.0)
        assert next(step for step in passes if step > reached + 3) <= reached + 10


def test_a_run_that_goes_on_to_another_target_looks_soon():
    """Invariant: whatever the verified pass has cost, EARLY come a pass's own steps apart; then each earns its cost."""
    schedule, passes = EvalSchedule(0.099, 130, 16), []
    for step in range(1, 401):
        schedule.observe(0.5 if step < 200 else 0.05)
        if step == 200:
            schedule.judged(0.05, passes=9)
            assert schedule.wait_steps > 100
            schedule.settle()
        elif step > 200 and schedule.due():
            passes.append(step)
            schedule.judged(0.05)
    cost = schedule.cost_steps
    at_once = [200 + ceil(cost) * n for n in range(1, EARLY + 1)]
    assert passes == [*at_once, *(200 + ceil(cost / BUDGET * n) for n in range(1, 5))]


def test_a_look_costs_at_least_its_way_and_delays_no_fallback():
    """Invariant: after a look the next one is a pass's own steps away; a pass is due by what is known of passes."""
    schedule = EvalSchedule(0.099, 130, 16)
    for _ in range(300):
        schedule.observe(0.09)
    schedule.judged(0.09)
    for _ in range(ceil(schedule.cost_steps)):
        assert not schedule.due()
        schedule.observe(0.09)
    looks = 0
    while schedule.due():
        before = schedule._passes
        schedule.looked(1 / 130)
        assert schedule._passes == before + LEAST
        looks += 1
        for _ in range(ceil(schedule.cost_steps)):
            assert not schedule.due()
            schedule.observe(0.09)
        if looks == 20:
            break
    assert looks == 20, "looks alone do not spend the budget"
    assert schedule._last_step == 300


def test_the_first_pass_comes_before_the_training_loss_is_there():
    """Invariant: training losses lag behind a full pass, so the first pass comes while they are still above target."""
    first = play([falling(step) for step in range(400)])[0]
    assert 0.099 < falling(first) < 0.16


@pytest.mark.parametrize("windows", [10, 130, 4000, 20_000])
@pytest.mark.parametrize("lag", [0.5, 1.0, 1.4])
def test_passes_stay_within_the_budget(windows, lag):
    """Invariant: at no time have the first two passes, or the later ones, cost more than their share of the steps."""
    for hovering in (0.1, 0.12, 0.2):
        passes = play([hovering] * 3000, windows=windows, lag=lag)
        cost = EvalSchedule(0.099, windows, 16).cost_steps
        assert all((i + 1) * cost <= EARLY_BUDGET * step for i, step in enumerate(passes[:EARLY]))
        assert all((i + 1) * cost <= BUDGET * step for i, step in enumerate(passes[EARLY:]))


def test_a_short_run_need_not_wait_for_the_budget():
    """Invariant: two passes are made before the budget allows one, a pass's cost apart; then the budget holds."""
    cost = EvalSchedule(0.099, 249, 16).cost_steps
    passes = play([4.0] * 35 + [0.12] * 400, windows=249)
    assert passes[1] < cost / BUDGET
    assert passes[1] - passes[0] >= cost
    assert passes[3] >= 2 * cost / BUDGET


def test_a_run_that_has_reached_it_is_judged_soon():
    """Invariant: a loss that drops to half the target is judged as soon as the mean of the last steps shows it."""
    passes = play([0.5] * 300 + [0.05] * 60)
    expected = next(n for n in range(60) if 0.05 + 0.45 * MEMORY**n <= WORTHWHILE * 0.099)
    assert passes[0] == 300 + expected


def test_a_misleading_pass_is_not_believed_for_long():
    """Invariant: near the target a pass is made every four costs, even where the last one foretold failure."""
    passes = play([0.12] * 2000, lag=1.4)
    assert len(passes) > 20
    assert min(b - a for a, b in pairwise(passes)) >= 4 * EvalSchedule(0.099, 130, 16).cost_steps


@pytest.mark.parametrize("windows", [10, 130, 4000])
def test_a_pass_is_made_as_soon_as_it_can_be(windows):
    """Reference: the step of each pass, when the losses always call for one, is the one that wait_steps foretold."""
    schedule, foretold, made = EvalSchedule(0.099, windows, 16), set(), []
    for step in range(3000):
        foretold.add(step + schedule.wait_steps)
        schedule.observe(0.05)
        if schedule.due():
            made.append(step + 1)
            schedule.judged(0.0495)
    assert made == sorted(foretold)[: len(made)]
    assert len(foretold) <= len(made) + 1


def test_an_average_ripens_before_it_is_judged():
    """Reference: however low the loss, no pass is due before the first weights are a quarter of a real average.

    wait_steps says how long, also before the average has begun.
    """
    schedule = TrainState.of(resolve_recipe(TrainConfig()), judged_windows=10, launched_at=0.0).schedule
    weight = torch.zeros(1)
    average = EMA([weight], TrainConfig.ema)
    begun = 0
    for loss in [2.0] * 50 + [0.05] * 60:
        schedule.observe(loss)
        if not schedule.averaging:
            assert schedule.wait_steps == 47
            assert not schedule.due()
            continue
        average.update()
        weight.fill_(1.0)  # of the average, all but the first weights
        begun += 1
        first_share = 1 - average.mean[0].item()
        assert schedule.due() == (first_share <= 0.25)
        assert schedule.wait_steps == max(1, 47 - begun)
    assert begun > 47


def test_since_when_a_run_may_have_reached_its_target_unseen():
    """Reference: by hand; a pass over 40 windows costs a step, the first is affordable at step 4, the third at 13."""
    schedule = EvalSchedule(0.099, 40, 16)
    unjudged = []
    for step in range(1, 15):
        schedule.observe(3.0)
        unjudged.append(schedule.unjudged_steps)
        if step in (5, 8):
            schedule.judged(2.0)
    assert unjudged == [1, 2, 3, 0, 0, 1, 2, 0, 1, 2, 3, 4, 0, 0]


@pytest.mark.parametrize("options", [{"ema": 0.0}, {"target_loss": 3.0}, {"recipe": "fast", "target_loss": 0.45}])
def test_nobody_waits_for_an_average_that_may_never_be(options):
    """Invariant: without an average, or where passes may come before one, the first step may be judged."""
    config = resolve_recipe(TrainConfig(**options))
    schedule = TrainState.of(config, judged_windows=10, launched_at=0.0).schedule
    schedule.observe(config.target_loss)
    assert schedule.due()


def test_a_resumed_schedule_goes_on_with_its_counts_alone():
    """Invariant: what the run's options say is not taken from a checkpoint."""
    before, after = EvalSchedule(0.1, 10, 16, ripe_steps=5.0), EvalSchedule(0.2, 20, 16, ripe_steps=7.0)
    for loss in (3.0, 2.0, 1.0):
        before.observe(loss)
    before.judged(1.5)
    after.load_state_dict(before.state_dict())
    assert (after.target_loss, after.cost_steps, after.ripe_steps) == (0.2, 0.5, 7.0)
    assert after.estimate == before.estimate
    assert after.state_dict() == before.state_dict()
