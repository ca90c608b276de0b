"""What a score allows whoever recomputes it, and scores at their limits."""

import math
from dataclasses import replace

import pytest
import torch

from harness.runs import ALONE
from nanogpt.config.train_config import TrainConfig
from nanogpt.data.windows import CONTROL_TOKENS, control_windows, memorised_windows
from nanogpt.evaluate.recall import Forward
from nanogpt.evaluate.scorecard import draws_log10, make_scorecard
from nanogpt.model.gpt import GPT, GPTConfig

CONFIG = TrainConfig(subset_tokens=60, context_length=16, stride=16, block_size=16)


def score(model, ids, config=CONFIG):
    windows = memorised_windows(ids, config)
    forward = Forward(ALONE, dtype="fp32", rows=8)
    return make_scorecard(model, windows, windows.judged_starts(2), control_windows(ids, config), forward, floor=0.0)


def small_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16))


def test_the_draws_that_suffice():
    """Reference: the least n with 1 - (1 - p)^n at or above the share, found by counting; the limit where p is tiny."""
    for p in (0.99999, 0.9, 0.5, 0.3, 0.01):
        for share in (0.5, 0.99):
            n = next(n for n in range(1, 1000) if 1 - (1 - p) ** n >= share)
            assert round(10 ** draws_log10(math.log(p), share)) == n, (p, share)
    assert draws_log10(0.0, 0.99) == 0.0
    assert draws_log10(-1e4, 0.5) == pytest.approx((1e4 + math.log(math.log(2))) / math.log(10))
    assert math.isnan(draws_log10(math.nan, 0.5))
    assert draws_log10(-29.999, 0.5) == pytest.approx(draws_log10(-30.001, 0.5), abs=1e-3)


def test_the_control_is_text_that_follows():
    """Invariant: of the same form, never a memorised token, bounded; none where one window does not fit."""
    ids = list(range(5000))
    control = control_windows(ids, CONFIG)
    assert control.ids.tolist() == ids[60:120]
    assert len(control_windows(ids, replace(CONFIG, subset_tokens=2000)).ids) == CONTROL_TOKENS
    assert control_windows(ids[: 60 + 16], CONFIG) is None
    assert control_windows(ids[: 60 + 17], CONFIG).ids.tolist() == ids[60:77]
    assert score(small_model(), ids[:60]).values().control is None


def test_near_ties_are_allowed_for():
    """Invariant: a model that is indifferent may be found anywhere, one whose decisions are clear only where it is."""
    ids = torch.randint(50257, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-6)  # all logits nearly alike
    loose = dict(score(model, ids).flat())
    for name in ("full_pass.token_accuracy", "recall.exact_recall", "recall.hop_recitation.recited"):
        assert (loose[name].low, loose[name].value, loose[name].high) == (0.0, 0.0, 1.0), name
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[ids[7]] = 1.0  # it says this token, whatever comes before
    firm = dict(score(model, ids).flat())
    for name, found in firm.items():
        if name.split(".")[-1] in ("token_accuracy", "exact_recall", "recited", "recitation_breaks", "max_tokens"):
            assert found.low == found.value == found.high, name
    assert firm["full_pass.token_accuracy"].value > 0


def test_a_broken_model_has_a_scorecard():
    """Invariant: figures that are not numbers are None, and no exception."""
    model = small_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    values = score(model, list(range(300))).values()
    assert values.memorised.strided_loss is None
    assert values.memorised.recall.exact_recall == 0.0
