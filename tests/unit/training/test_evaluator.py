"""The evaluator: which weights it judges, in which precisions, at what cost, and what spares a full pass."""

from collections import Counter

import pytest
import torch

from harness.copier import copier, plan_of
from harness.runs import ALONE
from nanogpt.distributed.replicas import fingerprints
from nanogpt.engine import EngineOptions
from nanogpt.engine.single import SingleEngine
from nanogpt.evaluate.recall import Forward, hop_starts, read
from nanogpt.model.gpt import GPT
from nanogpt.monitor.loggers import NullLogger
from nanogpt.optim.ema import EMA
from nanogpt.storage.run_lock import NoFence
from nanogpt.training.evaluator import FEW, FP32_COST, Evaluator
from nanogpt.training.state import RunContext
from nanogpt.utils.phases import Phases
from nanogpt.utils.signals import StopRequested

MIDDLE = (30,)  # where the text is odd: twice the copier is wrong, at this token and at the one after it


class Told(SingleEngine):
    """Notes the weights that it holds each time it is told that somebody wrote to them."""

    def __init__(self, *given):
        super().__init__(*given)
        self.told = []

    def weights_written(self):
        self.told.append(fingerprints(self.weights()))


class Asked:
    """Is asked to stop at the n-th look; 0: never."""

    def __init__(self, at):
        self.looks, self.at = 0, at

    @property
    def requested(self):
        self.looks += 1
        return self.looks == self.at


def judging(plan, model, *, stop_at=0):
    """An evaluator of model's weights, its engine and its average, which is empty."""
    options = EngineOptions(dtype=plan.config.dtype, optimizer="adamw", compile=False, micro_batches=[])
    engine = Told(model, ALONE, options)
    average = EMA(engine.local_weights(), plan.config.ema)
    context = RunContext(plan, ALONE, plan.config.out_dir, NullLogger(), Phases(), Asked(stop_at), NoFence())
    return Evaluator(context, plan.dataset.windows, engine, average), engine, average


def counted(model):
    """How many windows the model is given from here on, by precision."""
    given = Counter()

    def count(_, idx, __):
        given["bf16" if torch.is_autocast_enabled("cpu") else "fp32"] += len(idx[0])

    model.register_forward_hook(count)
    return given


@pytest.mark.parametrize("stop_at", [0, 3])
def test_the_average_is_judged_and_the_weights_come_back(tmp_path, stop_at):
    """Reference: loss and fingerprints of a model with the average's weights; then the weights; all bit for bit.

    Also where the run is asked to stop in the middle. The engine hears of both changes, after each.
    """
    plan = plan_of(tmp_path, odd=MIDDLE, target_loss=4.0)
    evaluator, engine, average = judging(plan, copier(), stop_at=stop_at)
    average.update()
    of_average = fingerprints(engine.weights())
    engine.model.load_state_dict(GPT(engine.model.config).state_dict())
    of_training = fingerprints(engine.weights())
    if stop_at:
        with pytest.raises(StopRequested):
            evaluator.full_pass(step=1, is_last=True)
        assert evaluator.evaluated == {}
    else:
        found = evaluator.full_pass(step=1, is_last=True)
        forward = Forward(ALONE, dtype="fp32", rows=plan.evaluation_rows)
        assert found.loss == read(copier(), plan.dataset.windows, plan.dataset.judged, forward).loss
        assert evaluator.evaluated == of_average
    assert engine.told == [of_average, of_training]
    assert fingerprints(engine.weights()) == of_training != of_average


FAR, NEAR = 0.01, 4.0  # target losses that the copier misses and has, with the one odd token
UNSURE = {"sure": 0.05, "target_loss": 11.0}  # margins of 0.1 to 0.25: a near tie in bf16, and none in fp32


@pytest.mark.parametrize(
    ("dtype", "target_recall", "case", "bf16", "fp32", "recalled"),
    [
        ("fp32", None, {"target_loss": FAR}, (), ("pass",), None),
        ("fp32", None, {"target_loss": NEAR}, (), ("pass", "pass"), None),
        ("fp32", 1.0, {"odd": ()}, (), ("pass", "hops"), True),  # it was read as scores are: that decides
        ("fp32", 1.0, {"target_loss": NEAR}, (), ("pass",), False),
        ("fp32", 1.0, {"target_loss": NEAR, "is_last": True}, (), ("pass",), False),
        ("fp32", 0.5, {"target_loss": FAR}, (), ("pass",), False),
        ("fp32", 0.5, {"target_loss": NEAR}, (), ("pass",), True),
        ("fp32", 0.5, {"odd": ()}, (), ("pass",), True),  # a share asks for no recital, though all comes back
        ("bf16", None, {"target_loss": FAR}, ("pass",), (), None),
        ("bf16", None, {"target_loss": FAR, "is_last": True}, ("pass",), (), None),  # its scores read again anyway
        ("bf16", None, {"target_loss": NEAR}, ("pass",), ("pass",), None),
        ("bf16", 1.0, {"odd": ()}, ("pass", "hops"), ("pass", "hops"), True),
        ("bf16", 1.0, {"target_loss": NEAR}, ("pass",), (), False),
        ("bf16", 1.0, {"target_loss": NEAR, "is_last": True}, ("pass",), ("pass",), False),
        ("bf16", 1.0, {"odd": (), **UNSURE}, ("pass", "hops"), ("pass", "hops") * 2, True),  # all are read again, twice
    ],
)
def test_what_is_read_and_what_it_costs(tmp_path, dtype, target_recall, case, bf16, fp32, recalled):
    """Reference: the windows that the model was given, counted by a hook; the cost is theirs, fp32's after bf16 x 4."""
    case = dict(case)
    is_last, sure, odd = case.pop("is_last", False), case.pop("sure", 20.0), case.pop("odd", MIDDLE)
    plan = plan_of(tmp_path, odd=odd, dtype=dtype, target_recall=target_recall, **case)
    evaluator, engine, _ = judging(plan, copier(sure))
    given = counted(engine.model)
    found = evaluator.full_pass(step=1, is_last=is_last)
    length = {"pass": len(plan.dataset.judged), "hops": len(hop_starts(plan.dataset.windows))}
    assert given == Counter(bf16=sum(length[x] for x in bf16), fp32=sum(length[x] for x in fp32))
    weight = FP32_COST if dtype == "bf16" else 1.0
    assert found.cost == pytest.approx((given["bf16"] + weight * given["fp32"]) / length["pass"], rel=1e-12)
    assert (found.recall is None) == (target_recall is None)
    reached = found.reaches(plan.config)
    assert reached == (recalled if target_recall else case["target_loss"] == NEAR)
    assert bool(evaluator.evaluated) == (reached or is_last)


def copied(plan):
    """By judged window, whether saying its prompt's last token once more brings back its second half."""
    windows = plan.dataset.windows
    length, ids = windows.context_length, windows.ids.tolist()
    return [len(set(ids[start + length // 2 - 1 : start + length])) == 1 for start in plan.dataset.judged.tolist()]


@pytest.mark.parametrize("odd", [(), MIDDLE, (20, 40), (58,), (10, 20, 30, 40, 50)])
def test_the_windows_that_are_missed(tmp_path, odd):
    """Reference: what the copier says, written out: those with another token in their second half, if they are few."""
    plan = plan_of(tmp_path, odd=odd, target_recall=0.9)
    evaluator, *_ = judging(plan, copier())
    found, right = evaluator.full_pass(step=1, is_last=False), copied(plan)
    missed = [start for start, ok in zip(plan.dataset.judged.tolist(), right, strict=True) if not ok]
    assert found.recall == sum(right) / len(right)
    assert found.missed == (tuple(missed) if len(missed) <= FEW * len(right) else ())
    assert (len(odd) > 2) == (len(missed) > FEW * len(right)), "both are shown"


@pytest.mark.parametrize(
    ("dtype", "sure", "came_back", "ruled_out"),
    [
        ("fp32", 20.0, False, True),
        ("fp32", 20.0, True, False),
        ("bf16", 20.0, False, True),
        ("bf16", 20.0, True, False),
        ("bf16", -0.02, True, False),  # beaten by less than bf16 can tell: it may be there
        ("fp32", -0.02, True, True),
        ("fp32", 1e-4, True, True),  # right by less than other machines agree on in fp32: it does not count
    ],
)
def test_a_look_at_what_was_missed(tmp_path, dtype, sure, came_back, ruled_out):
    """Invariant: it costs the windows looked at, once in the training's precision; where recall may be there, 0.

    Of the average's weights; the training's come back.
    """
    plan = plan_of(tmp_path, odd=MIDDLE, dtype=dtype, target_recall=0.99)
    right, judged = copied(plan), plan.dataset.judged.tolist()
    missed = [start for start, ok in zip(judged, right, strict=True) if ok == came_back][:5]
    evaluator, engine, average = judging(plan, copier(sure))
    average.update()
    engine.model.load_state_dict(GPT(engine.model.config).state_dict())
    before, given = fingerprints(engine.weights()), counted(engine.model)
    cost = evaluator.rules_out_recall(missed)
    assert given == {dtype: len(missed)}
    assert cost == (len(missed) / len(judged) if ruled_out else 0.0)
    assert fingerprints(engine.weights()) == before


def test_a_look_goes_by_the_target(tmp_path):
    """Invariant: windows still missed rule out a share above what is left, and not that share; 1 needs the recital."""
    plan = plan_of(tmp_path, odd=MIDDLE)
    judged = plan.dataset.judged
    missed = [start for start, ok in zip(judged.tolist(), copied(plan), strict=True) if not ok]
    left = 1 - len(missed) / len(judged)
    for target, windows, cost in [
        (None, missed, 0.0),
        (left - 1e-9, missed, 0.0),
        (left + 1e-9, missed, len(missed) / len(judged)),
        (0.99, (), 0.0),  # nothing is known of single windows: a full pass it is
        (1.0, (), len(hop_starts(plan.dataset.windows)) / len(judged)),
    ]:
        evaluator, *_ = judging(plan_of(tmp_path, odd=MIDDLE, target_recall=target), copier())
        assert evaluator.rules_out_recall(windows) == cost, target
    evaluator, *_ = judging(plan_of(tmp_path, target_recall=1.0), copier())
    assert evaluator.rules_out_recall(()) == 0.0, "all is recited"
