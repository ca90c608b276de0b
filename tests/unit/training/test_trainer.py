"""What the loop decides: who trains on which rows, when it evaluates, and why it ends."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from harness.copier import plan_of
from harness.runs import ALONE
from nanogpt.data.windows import Windows
from nanogpt.evaluate.eval_schedule import LEAST
from nanogpt.evaluate.evaluation import Evaluation
from nanogpt.training.state import TrainState
from nanogpt.training.trainer import Trainer, micro_batches
from nanogpt.utils.phases import Phases

PARTS = (
    "windows", "engine", "average", "replicas", "sentinel", "state", "checkpoints", "evaluator", "profiler", "metrics",
    "token_losses",
)  # fmt: skip


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8, 100])
def test_the_rows_of_all_ranks_are_the_global_batch(tmp_path, micro_batch_size):
    """Reference: the global batch taken whole, in order, of steps that straddle epochs, on 1 to 8 ranks.

    Every micro-batch counts the whole batch's targets, else its gradient were no share of the global mean.
    """
    config = replace(plan_of(tmp_path).config, micro_batch_size=micro_batch_size)
    windows = Windows(torch.arange(60), context_length=8, stride=7, phase="random", seed=0)
    assert windows.per_epoch % config.batch_size, "some step's batch is of two epochs"
    for size, step in product((1, 2, 3, 5, 8), range(3)):
        every = []
        for rank in range(size):
            mine = micro_batches(config, windows, replace(ALONE, rank=rank, size=size), step)
            assert all(0 < len(batch.idx) <= micro_batch_size for batch in mine)
            every += mine
        idx, targets = windows.take(windows.global_batch(step, config.batch_size))
        assert torch.equal(torch.cat([batch.idx for batch in every]), idx)
        assert torch.equal(torch.cat([batch.targets for batch in every]), targets)
        assert {batch.step_tokens for batch in every} == {targets.numel()}


def trainer(plan, **parts):
    """A trainer of these parts, of which it asks no others."""
    context = SimpleNamespace(plan=plan, world=ALONE, phases=Phases(), logger=None, stop=None)
    state = TrainState.of(plan.config, judged_windows=len(plan.dataset.judged), launched_at=0.0)
    return Trainer(context, **(dict.fromkeys(PARTS) | {"state": state} | parts))


@pytest.mark.parametrize(
    ("reaches", "bad_steps", "step", "out_of_time", "reason"),
    [
        (True, 4, 9, True, "target_reached"),  # whatever else has come to its end with it
        (False, 4, 9, True, "non_finite"),  # a larger budget would not help
        (False, 3, 9, True, "max_steps"),
        (False, 3, 8, True, "max_minutes"),
        (False, 3, 8, False, None),
        (False, 0, 10, False, "max_steps"),  # resumed with a smaller budget than it has spent
    ],
)
def test_why_it_ends(tmp_path, reaches, bad_steps, step, out_of_time, reason):
    """Reference: written out, the first that holds of: reached, broken, out of steps, out of time."""
    run = trainer(plan_of(tmp_path, max_steps=9, max_minutes=1.0, max_bad_steps=4))
    run.state.step, run.state.bad_steps_in_a_row = step, bad_steps
    loss = run.config.target_loss * (1.0 if reaches else 1.01)
    assert run._reason_to_stop(Evaluation(loss), out_of_time) == reason
    if not reaches:
        assert run._reason_to_stop(None, out_of_time) == reason


class Noted:
    """Stands for checkpoints, evaluator and replicas: notes what is asked of it, and finds what it is told to find."""

    def __init__(self, found, look=0.0):
        self.asked, self._found, self._look = [], found, look

    def save_and_wait(self):
        self.asked.append("save")

    def rules_out_recall(self, missed):
        self.asked.append(("look", missed))
        return self._look

    def full_pass(self, *, step, is_last):
        self.asked.append("last pass" if is_last else "pass")
        return self._found

    def check(self, step):
        self.asked.append("compare")


THERE = Evaluation(0.05, 0.9, cost=1.5, missed=(4, 6))  # the loss, and not the recall
REACHED = Evaluation(0.05, 1.0, by_heart=True)
LOOK = ("look", (2,))


@pytest.mark.parametrize(
    ("found", "look", "awaits", "due", "max_steps", "asked"),
    [
        (THERE, 0.0, False, False, None, []),
        (THERE, 0.5, False, True, None, ["pass"]),  # nobody waits for a recall: there is nothing to look at
        (THERE, 0.5, True, True, None, [LOOK]),
        (THERE, 0.0, True, True, None, [LOOK, "pass"]),
        (THERE, 0.5, True, False, None, []),  # what is not due is not looked for either
        (THERE, 0.5, True, True, 100, ["save", "last pass"]),  # the end wants a pass, and a save of before it
        (REACHED, 0.0, True, True, None, [LOOK, "pass", "compare"]),
        (REACHED, 0.0, False, False, 100, ["save", "last pass", "compare"]),
    ],
)
def test_when_it_evaluates(tmp_path, found, look, awaits, due, max_steps, asked):
    """Invariant: a look goes before a pass for recall, and may spare it; a spent budget is saved, then judged.

    Only a pass that reaches the targets has the replicas compared. The schedule is charged what either has cost.
    """
    parts = Noted(found, look)
    run = trainer(plan_of(tmp_path, target_recall=1.0, max_steps=max_steps), evaluator=parts, checkpoints=parts)
    run.replicas, state = parts, run.state
    for _ in range(100):
        state.schedule.observe(0.06 if due else 5.0)
    state.step, state.awaits_recall, state.missed = 100, awaits, (2,)
    assert state.schedule.due() == due
    before = state.schedule._passes
    reason, judged = run._evaluate(False)
    assert parts.asked == asked
    assert judged == (found if {"pass", "last pass"} & set(asked) else None)
    assert reason == ("target_reached" if judged == REACHED else "max_steps" if max_steps else None)
    spent = found.cost if judged else max(look, LEAST) if asked else 0.0
    assert state.schedule._passes == pytest.approx(before + spent)
    assert state.schedule.due() == (due and not asked)
    assert (state.awaits_recall, state.missed) == ((True, found.missed) if judged else (awaits, (2,)))
