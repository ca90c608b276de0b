"""A row of metrics.jsonl: what it says where a step gave no figure, and when the run ends."""

import json
from math import isnan
from types import SimpleNamespace

import pytest

from harness.copier import plan_of
from harness.runs import ALONE
from nanogpt.evaluate.evaluation import Evaluation
from nanogpt.model.gpt import GPTConfig
from nanogpt.monitor.eta import Eta, NoEta
from nanogpt.training.metrics import MetricsProcessor
from nanogpt.training.state import TrainState
from nanogpt.utils.phases import Phases

REACHED, FAR = Evaluation(0.05, 1.0, by_heart=True), Evaluation(0.5, 0.2)
NOT_YET, AWAITED = "no ETA yet", "target loss reached, recall awaited"


class Foretold(TrainState):
    """A run whose ETA is known."""

    foretold: Eta | NoEta = Eta(10.0, 4.0, 40.0)

    def eta(self, config, **known):
        return self.foretold


def processor(plan, *, communication_s=None, forward_s=None):
    engine = SimpleNamespace(
        world=ALONE, model=SimpleNamespace(config=GPTConfig.from_options(plan.config)),
        exposed_communication_s=lambda: communication_s, forward_s=lambda: forward_s,
    )  # fmt: skip
    return MetricsProcessor(plan, engine, Phases(), peak_flops_per_s=1e12, say=print)


def state_of(plan):
    return Foretold.of(plan.config, judged_windows=27, launched_at=0.0)


@pytest.mark.parametrize(
    ("found", "awaits", "eta", "note"),
    [(None, False, None, NOT_YET), (FAR, False, None, NOT_YET), (None, True, None, AWAITED), (REACHED, True, 0, None)],
)
def test_a_row_without_a_finite_step(tmp_path, found, awaits, eta, note):
    """Invariant: it is strict JSON, no mean of nothing, and no point of the curve that the ETA is fitted to.

    Only a pass that reaches the targets says when the run ends: now, though nobody knows how long a step takes.
    """
    plan = plan_of(tmp_path, target_recall=1.0)
    metrics, state = processor(plan), state_of(plan)
    state.awaits_recall = awaits
    row = metrics.row(state, found)
    told = json.loads(row.to_json(), parse_constant=pytest.fail)
    assert isnan(row.loss)
    assert {told[name] for name in ("loss", "lr", "grad_norm", "tokens_per_s", "step_s", "mfu")} == {None}
    assert state.history == []
    assert {told[name] for name in ("eta_s", "eta_low_s", "eta_high_s")} == {eta}
    assert told["eta_note"] == note
    assert told["full_pass_loss"] == (found and found.loss)


@pytest.mark.parametrize(
    ("target_recall", "eta", "seconds", "note"),
    [
        (None, Eta(10.0, 4.0, 40.0), (20.0, 8.0, 80.0), None),
        (None, Eta(10.0, 4.0, 40.0, by_reference=True), (20.0, 8.0, 80.0), "by reference runs"),
        (0.5, Eta(10.0, 4.0, 40.0), (20.0, 8.0, 80.0), "to the target loss"),
        (0.5, Eta(10.0, 4.0, 40.0, by_reference=True), (20.0, 8.0, 80.0), "to the target loss, by reference runs"),
        (0.5, NoEta.BELOW_PLATEAU, (None, None, None), "target below the plateau"),
    ],
)
def test_an_eta_is_in_seconds(tmp_path, target_recall, eta, seconds, note):
    """Reference: written out: steps of 2 s in the median of 1, 2 and 9; tokens/s and MFU of their sum.

    Of its note recall comes first: the loss is what is foretold, by whatever it is.
    """
    plan = plan_of(tmp_path, target_recall=target_recall)
    metrics, state = processor(plan), state_of(plan)
    state.foretold, state.step = eta, 3
    for loss_sum, step_s in ((64.0, 1.0), (128.0, 2.0), (192.0, 9.0)):
        state.meter.add(loss_sum, 64, step_s)
    row = metrics.row(state, None)
    assert (row.eta_s, row.eta_low_s, row.eta_high_s) == seconds
    assert row.eta_note == note
    assert (row.loss, row.tokens, row.tokens_per_s, row.step_s) == (2.0, 192, 16.0, 2.0)
    assert row.mfu == metrics.mfu_terms().flops_per_token * 16.0 / 1e12
    assert state.history == [(3, 2.0)]


@pytest.mark.parametrize(
    ("communication_s", "forward_s", "slowest"), [(None, None, None), (None, 0.5, 0), (0.25, 0.5, 0)]
)
def test_what_an_engine_cannot_tell(tmp_path, communication_s, forward_s, slowest):
    """Invariant: communication is null where it is hidden in compute; ranks are compared by what there is.

    A rank's own work in a step is told only where no other's is in it.
    """
    plan = plan_of(tmp_path)
    metrics, state = processor(plan, communication_s=communication_s, forward_s=forward_s), state_of(plan)
    metrics._clock._seconds["compute"] = 1.0  # of one step
    metrics.count_step()
    row = metrics.row(state, None)
    apart = communication_s is not None
    assert (row.time_share["communication"] is None) == (not apart)
    assert row.slowest_rank == slowest
    own_s = 0.75 if apart else None
    assert (row.fastest_rank_step_s, row.slowest_rank_step_s) == (own_s, own_s)
    if apart:
        assert row.time_share["compute"] / row.time_share["communication"] == pytest.approx(3.0)
