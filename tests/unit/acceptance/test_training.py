"""What the stage that trains makes of how its run ended, and of the options that it is given."""

from dataclasses import replace

import pytest

from nanogpt.acceptance.stages.training import Training, check_options, judge_training
from nanogpt.acceptance.verdict import Verdict
from nanogpt.config.errors import ConfigError

TRAINING = Training(
    options="--recipe=fast", minutes=3.0, statuses=(0, 0, 0), said="", rows=114, last_row_s=180.0,
    silent_s=60.0, steps=114,
    loss=0.0975, target_loss=0.099, exact_recall=0.98, train_s=265.0, step_s=1.9, tokens_per_s=539.0, mfu=0.7,
    communication_share=None, slowest_rank=2,
    slowest_rank_rows=0.9, slowest_rank_ratio=1.1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "last_row_s", "verdict", "ranks"),
    [
        ((0, 0, 0), 180.0, Verdict.PASS, ()),
        ((3, 3, 3), 180.0, Verdict.UNKNOWN, ()),  # the time was over
        ((None, None, None), 180.1, Verdict.UNKNOWN, ()),  # while it scored what it had reached
        ((None, None, None), 90.0, Verdict.FAIL, ()),  # it hung
        ((None, None, None), None, Verdict.UNKNOWN, ()),  # not even a step
        ((None, None, -9), 90.0, Verdict.FAIL, (2,)),
        ((None, 1, None), 90.0, Verdict.FAIL, (1,)),
        ((1, 1, 1), 90.0, Verdict.FAIL, ()),  # nobody knows who was the first
        ((2, 2, 2), None, Verdict.FAIL, ()),
        ((0, 0, None), 90.0, Verdict.FAIL, ()),
    ],
)
def test_only_a_verified_target_passes(statuses, last_row_s, verdict, ranks):
    """Invariant: time that was over is UNKNOWN, whatever the loss; what broke or hung FAILs, with who broke first."""
    check = judge_training(replace(TRAINING, statuses=statuses, last_row_s=last_row_s))[0]
    assert (check.verdict, check.ranks) == (verdict, ranks)


def test_a_slow_rank_is_blamed():
    """Invariant: at 1.5 x the median's time a rank is named, at 1.4 x it is not; nobody knows, UNKNOWN."""
    slow, fine = (judge_training(replace(TRAINING, slowest_rank_ratio=ratio))[1] for ratio in (1.5, 1.4))
    assert (slow.verdict, slow.ranks, fine.verdict) == (Verdict.FAIL, (2,), Verdict.PASS)
    assert judge_training(replace(TRAINING, slowest_rank=None))[1].verdict is Verdict.UNKNOWN
    seldom = replace(TRAINING, slowest_rank_ratio=1.5, slowest_rank_rows=0.4)
    assert judge_training(seldom)[1].verdict is Verdict.PASS
    assert judge_training(replace(TRAINING, statuses=(0,)))[1].verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--out_dir=x", "--out_dir is the acceptance's own"),
        ("--max-minutes=3", "--max_minutes is the acceptance's own"),
        ("--n_layers=2", "did you mean --n_layer"),
        ("--recipe='fast", "No closing quotation"),
    ],
)
def test_options_of_the_training_are_checked(words, said):
    """Invariant: a mistake in --training is one line before anything is measured."""
    with pytest.raises(ConfigError, match=said):
        check_options(words)
