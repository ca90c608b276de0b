"""The ETA: exact where the truth is a formula, consistent under changes of unit, and silent where nothing is known."""

import json
import time
from dataclasses import replace
from math import log, sqrt

import numpy as np
import pytest

from harness.runs import REPOSITORY, metrics
from nanogpt.config.train_config import TrainConfig
from nanogpt.monitor.eta import Circumstances, Eta, NoEta, fit_curve, steps_to_target
from nanogpt.optim.recipe import ADAMW, resolve_recipe
from nanogpt.plan.reference_runs import ReferenceRun
from nanogpt.training.state import TrainState

TARGET = 0.099
KNOWN = Circumstances(floor=0.03)


def exponential(step, rate=0.02, floor=0.03):
    """A loss that falls from 8 to a floor."""
    return floor + 8 * np.exp(-rate * step)


def rows(curve, last, every=5):
    """What a run logs whose loss at a time is curve(time): (step, mean since the row before)."""
    inside = (np.arange(100) + 0.5) / 100 * every
    return [(step, float(np.mean(curve(step - every + inside)))) for step in range(every, last + 1, every)]


@pytest.mark.parametrize("power", [0.5, 0.75, 1.25])
def test_a_curve_of_the_family_is_recovered(power):
    """Reference: a + (c - (1 - power) k step) ** (1 / (1 - power)) solves d(loss)/d(step) = -k (loss - a)**power."""
    asymptote, bent, k = 0.05, 1 - power, 0.01
    steps = np.arange(0.0, 60.0)
    losses = asymptote + (5**bent - bent * k * steps) ** (1 / bent)
    crossing = (5**bent - (0.2 - asymptote) ** bent) / (bent * k)
    curve = fit_curve((steps, losses, np.full(60, 1 / 60)), power, asymptote, lowest=0.1, known=Circumstances())
    assert curve.step_of(0.2) == pytest.approx(crossing, rel=2e-3)
    assert sqrt(curve.error) < 1e-3


def test_an_exponential_is_recovered():
    """Reference: the step at which 0.03 + 8 exp(-0.02 step) is the loss asked for."""
    steps = np.arange(0.0, 150.0)
    curve = fit_curve((steps, exponential(steps), np.full(150, 1 / 150)), 1.0, 0.03, lowest=0.08, known=Circumstances())
    assert curve.step_of(TARGET) == pytest.approx(log(8 / (TARGET - 0.03)) / 0.02, rel=1e-3)


def test_a_falling_rate_is_foreseen():
    """Reference: a loss L that falls at 0.02 L and, below 0.8, at 0.02 sqrt(L / 0.8) L, to no floor."""
    bend = log(8 / 0.8) / 0.02

    def slowing(step):
        slowed = 0.8 / (1 + 0.01 * (step - bend).clip(0)) ** 2
        return np.where(step < bend, 8 * np.exp(-0.02 * step), slowed)

    end = bend + ((0.8 / TARGET) ** 0.5 - 1) / 0.01
    known = Circumstances(slows_below=0.8)
    steps = np.arange(0.0, 100.0)  # all before the bend
    curve = fit_curve((steps, slowing(steps), np.full(100, 0.01)), 1.0, 0.0, lowest=0.08, known=known)
    assert curve.step_of(TARGET) == pytest.approx(end, rel=2e-3)
    eta = steps_to_target(rows(slowing, 200), TARGET, known)
    assert eta.low < end - 200 < eta.high
    assert eta.steps == pytest.approx(end - 200, rel=0.2)


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_an_exponential_is_foreseen(share):
    """Reference: the interval spans the steps at which the loss crosses most levels, the point is near the target's."""
    at = {level: log(8 / (level * TARGET - 0.03)) / 0.02 for level in ADAMW.levels}
    now = int(at[1.0] * share) // 5 * 5
    eta = steps_to_target(rows(exponential, now), TARGET, KNOWN)
    assert eta.low < at[1.0] - now < eta.high
    assert at[1.6] - now < eta.steps * 1.02
    assert eta.steps < (at[0.8] - now) * 1.02


def test_noise_does_not_mislead():
    """Invariant: with 3 % noise on every row the interval holds the truth 4 times in 5, the point within a third."""
    true = log(8 / (TARGET - 0.03)) / 0.02
    clean = rows(exponential, 150)
    ratios = []
    for seed in range(40):
        noise = np.exp(0.03 * np.random.default_rng(seed).standard_normal(len(clean)))
        eta = steps_to_target([(s, loss * n) for (s, loss), n in zip(clean, noise, strict=True)], TARGET, KNOWN)
        ratios.append((eta.low / (true - 150), eta.steps / (true - 150), eta.high / (true - 150)))
    low, point, high = np.array(ratios).T
    assert np.mean((low <= 1) & (high >= 1)) >= 0.8
    assert np.all(np.abs(np.log(point)) < log(4 / 3))


@pytest.mark.parametrize("k", [3, 10])
def test_a_longer_step_is_only_another_unit(k):
    """Invariant: a run whose every step takes k steps ends k times as late."""
    known = Circumstances(
        floor=0.03, epoch_steps=4.0, slows_below=0.8, lag_steps=32.0, wait_steps=7.0,
        averages_below=0.2, ripe_steps=90.0,
    )  # fmt: skip
    history = rows(exponential, 150)
    eta = steps_to_target(history, TARGET, known)
    longer = steps_to_target(
        [(k * step, loss) for step, loss in history],
        TARGET,
        replace(known, epoch_steps=4.0 * k, lag_steps=32.0 * k, wait_steps=7.0 * k, ripe_steps=90.0 * k),
    )
    assert [longer.steps, longer.low, longer.high] == pytest.approx([k * eta.steps, k * eta.low, k * eta.high])


def test_the_unit_of_the_loss_does_not_matter():
    """Invariant: losses, target and floor in bits per token give the same steps as in nats."""
    history = rows(exponential, 150)
    nats = steps_to_target(history, TARGET, replace(KNOWN, slows_below=0.8))
    bits = steps_to_target(
        [(step, loss / log(2)) for step, loss in history],
        TARGET / log(2),
        Circumstances(floor=0.03 / log(2), slows_below=0.8 / log(2)),
    )
    assert [bits.steps, bits.low, bits.high] == pytest.approx([nats.steps, nats.low, nats.high])


def test_a_later_target_takes_longer():
    """Invariant: point and interval move out as the target falls."""
    etas = [steps_to_target(rows(exponential, 150), target, KNOWN) for target in (0.3, 0.2, 0.15, 0.1, 0.07)]
    for name in ("low", "steps", "high"):
        figures = [getattr(eta, name) for eta in etas]
        assert figures == sorted(figures)


def test_a_plateau_above_the_target_is_named():
    """Invariant: a loss that bends to 0.4 is not extrapolated to 0.099, nor is a target below the floor."""
    bent = rows(lambda step: exponential(step, rate=0.05, floor=0.4), 200)
    assert steps_to_target(bent, TARGET, KNOWN) is NoEta.BELOW_PLATEAU
    assert steps_to_target(bent[:3], TARGET, Circumstances(floor=0.1)) is NoEta.BELOW_PLATEAU
    assert isinstance(steps_to_target(bent, 0.5, KNOWN), Eta)


def test_the_plateau_of_single_tokens_is_not_the_last():
    """Invariant: nothing is said of a loss that has bent to half its first value, where memorising has not begun."""
    bent = rows(lambda step: exponential(step, rate=0.1, floor=5.3), 150)
    for rows_so_far in (bent[:8], bent):  # while it bends; at a standstill
        assert steps_to_target(rows_so_far, TARGET, KNOWN) is NoEta.NOT_YET


def test_nothing_is_known_of_a_loss_that_does_not_fall():
    """Invariant: no rows, too few of them, less than three epochs, a standstill and a rise give no ETA."""
    falling = rows(exponential, 150)
    for history in ([], falling[:2], [(step, 5.3) for step, _ in falling], [(step, step / 9) for step, _ in falling]):
        assert steps_to_target(history, TARGET, KNOWN) is NoEta.NOT_YET
    assert steps_to_target(falling, TARGET, replace(KNOWN, epoch_steps=60.0)) is NoEta.NOT_YET
    assert isinstance(steps_to_target(falling, TARGET, replace(KNOWN, epoch_steps=40.0)), Eta)


def test_the_windows_of_an_epoch_are_averaged():
    """Invariant: a pattern that repeats each epoch does not change the answer."""
    pattern = [1.5, 0.7, 1.1, 0.7]  # its mean is 1
    smooth = [(20 * i + 5 * j, float(exponential(20.0 * i))) for i in range(10) for j in range(1, 5)]
    rough = [(step, loss * pattern[i % 4]) for i, (step, loss) in enumerate(smooth)]
    known = replace(KNOWN, epoch_steps=20.0)
    assert steps_to_target(rough, TARGET, known).steps == pytest.approx(steps_to_target(smooth, TARGET, known).steps)


def test_no_end_before_a_full_pass_can_be_made():
    """Invariant: point and interval are at least wait_steps away, even where the loss is below the target already."""
    for last in (150, 250, 400):
        eta = steps_to_target(rows(exponential, last), TARGET, replace(KNOWN, wait_steps=90.0))
        assert 90 <= eta.low <= eta.steps <= eta.high


def test_an_average_that_is_still_to_begin_is_not_judged_at_once():
    """Reference: the step at which 0.03 + 8 exp(-0.02 step) falls to 0.8, and 500 more, beside which lag is nothing."""
    begins = log(8 / (0.8 - 0.03)) / 0.02
    known = replace(KNOWN, lag_steps=32.0, averages_below=0.8, ripe_steps=500.0)
    eta = steps_to_target(rows(exponential, 115), TARGET, known)
    for steps in (eta.low, eta.steps, eta.high):
        assert steps == pytest.approx(begins + 500 - 115, rel=2e-3)  # the fits' ways to 0.8 part by a step


def test_an_end_that_nobody_could_have_judged_is_not_past():
    """Invariant: an end before a pass that did not end the run is wrong; without such a pass the next one is that end.

    With this lag the levels are crossed on both sides of step 400.
    """
    history, known = rows(exponential, 400), replace(KNOWN, lag_steps=180.0, wait_steps=2.0)
    soon = steps_to_target(history, TARGET, known)
    later = steps_to_target(history, TARGET, replace(known, judged_step=400.0))
    assert soon.low == pytest.approx(2)
    assert later.low > 2.1
    assert later.steps > 1.2 * soon.steps


def test_a_run_that_only_waits_for_its_average_is_told_how_long():
    """Reference: a loss that is far below the target when the average is 10 steps old; 47 steps ripen it."""
    config = resolve_recipe(TrainConfig(recipe="fast"))
    progress = TrainState.of(config, judged_windows=10, launched_at=0.0)
    averaged = 0
    for step in range(1, 200):
        loss = float(8 * np.exp(-0.2 * step))
        progress.schedule.observe(loss)
        progress.step = step
        progress.history.append((step, loss))
        averaged += progress.schedule.averaging
        if averaged > 10:
            eta = progress.eta(config, floor=0.0, windows_per_epoch=1)
            assert [eta.low, eta.steps, eta.high] == [pytest.approx(max(1, 47 - averaged))] * 3
        if progress.schedule.due():
            break
    assert averaged == 47


def reference(steps, at, loss=2.0, n_embd=1):
    """A finished run whose mean loss fell below loss at a step, and below a tenth of it ten times as late."""
    shape = {"optimizer": "adamw", "subset_tokens": 1, "context_length": 1, "batch_size": 1, "learning_rate": 1e-3}
    curve = ((9.6, 1), (loss, at), (loss / 10, 10 * at))
    return ReferenceRun(**shape, n_layer=1, n_embd=n_embd, floor=0.0, steps=steps, source="", curve=curve)


def test_reference_runs_foretell_until_a_fit_does():
    """Reference: by hand: runs that ended after 4, 5 and 6 times the steps in which their loss fell to 2."""
    known = replace(KNOWN, references=tuple(reference(steps, at=30) for steps in (120, 150, 180)))
    history = [(10, 8.0), (20, 5.0), (30, 3.0), (40, 2.0)]
    eta = steps_to_target(history, TARGET, known)
    assert eta.by_reference
    assert eta.steps == pytest.approx(40 * 5 - 40)
    assert eta.low < 40 * 3.1 / 1.4
    assert eta.high > 40 * 4.9 * 1.4
    assert steps_to_target(history, TARGET, replace(known, wait_steps=500.0)).low == 500
    # Twice as long an epoch: the mean of the newest two rows is looked up, between 9.6 and 2 on the logarithm.
    at = 1 + 29 * log(9.6 / 2.5) / log(9.6 / 2)
    assert steps_to_target(history, TARGET, replace(known, epoch_steps=20.0)).steps == pytest.approx(
        40 * (150 / at - 1)
    )
    falling = rows(exponential, 200)  # to 0.18
    assert not steps_to_target(falling, TARGET, known).by_reference
    assert steps_to_target(falling, TARGET, known) == steps_to_target(falling, TARGET, KNOWN)
    # Nothing is learnt yet; too few steps; a row so long that its loss is of long ago; twice as late as any other run.
    for unlike in ([(10, 9.7)], [(5, 5.0)], [(25, 3.0)], [(100, 2.0)]):
        assert steps_to_target(unlike, TARGET, known) is NoEta.NOT_YET
    assert steps_to_target(history, TARGET, replace(known, floor=0.1)) is NoEta.BELOW_PLATEAU


def test_a_reference_run_of_another_width_weighs_less():
    """Reference: by hand: exp(-1/2) at twice the width. Two of these are a run's worth, one is not."""
    history = [(10, 8.0), (20, 5.0), (30, 3.0), (40, 2.0)]
    narrow, wide = reference(120, at=30, n_embd=64), [reference(240, at=30, n_embd=128) for _ in range(2)]
    known = replace(KNOWN, n_embd=64, references=(narrow, *wide))
    assert steps_to_target(history, TARGET, known).steps < 40 * 7  # between theirs, nearer to its like
    assert steps_to_target(history, TARGET, replace(known, n_embd=128)).steps > 40 * 6
    assert steps_to_target(history, TARGET, replace(known, references=(*wide,))).steps == pytest.approx(40 * 7)
    assert not steps_to_target(history, TARGET, replace(known, references=(wide[0],))).by_reference


def test_a_long_history_is_read_in_milliseconds():
    """Invariant: an answer for 10,000 rows costs a hundredth of a default step, and leaves the history alone."""
    history = rows(lambda step: exponential(step, rate=1e-4), 10_000, every=1)
    kept = list(history)
    steps_to_target(history, TARGET, KNOWN)
    seconds = []
    for _ in range(5):
        started = time.thread_time()
        steps_to_target(history, TARGET, KNOWN)
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.02
    assert history == kept


@pytest.mark.parametrize("references", [(), (reference(120, at=30),)])
@pytest.mark.parametrize("losses", [[1e-30] * 9, [0.0] * 9, [1e30] * 9, [5.0, 0.0] * 5, [9.0] + [1e-9] * 8])
def test_strange_losses_raise_nothing(losses, references):
    """Invariant: any finite losses give an answer, and no figure of it is NaN or below 1."""
    known = replace(KNOWN, references=references)
    answer = steps_to_target([(10 * i + 10, loss) for i, loss in enumerate(losses)], TARGET, known)
    assert isinstance(answer, NoEta) or 1 <= answer.low <= answer.steps <= answer.high < np.inf


def test_a_replayed_run_gives_the_etas_that_the_run_logged(finished, tmp_path, forked):
    """Reference: the rows of a real run, whose seconds are steps of the row's length."""
    run_dir, _ = finished
    benchmarks, result = REPOSITORY / "benchmarks", tmp_path / "result.json"
    for words in (
        [benchmarks / "record_curve.py", run_dir, tmp_path / "tiny.jsonl"],
        [benchmarks / "eta_backtest.py", f"--curves={tmp_path}", f"--out={result}"],
    ):
        done = forked(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    (replayed,) = json.loads(result.read_text())
    logged = {row["step"]: row for row in metrics(run_dir)}
    last = metrics(run_dir)[-1]
    assert (last["eta_s"], last["eta_low_s"], last["eta_high_s"]) == (0, 0, 0), "it is reached"
    for forecast in replayed["forecasts"]:
        row = logged[replayed["steps"] - forecast["left"]]
        assert row["eta_note"] == forecast["note"]
        if "forecast" in forecast:
            for column, name in (("eta_s", "forecast"), ("eta_low_s", "low"), ("eta_high_s", "high")):
                assert row[column] / row["step_s"] == pytest.approx(forecast[name], rel=0.01)
    assert sum("forecast" in forecast for forecast in replayed["forecasts"]) >= 3


def test_the_backtest_is_of_this_estimator(tmp_path, forked):
    """Reference: the tables of eta.md, which are made of benchmarks/results/eta_backtest.epyc.2026-11-30.json."""
    script = REPOSITORY / "benchmarks" / "eta_backtest.py"
    now = forked(REPOSITORY, script, f"--out={tmp_path / 'result.json'}")
    kept = forked(REPOSITORY, script, "--table=benchmarks/results/eta_backtest.epyc.2026-11-30.json")
    assert now.stdout == kept.stdout, now.stderr
