"""Tokens are drawn as transformers draws them."""

from itertools import islice, product

import pytest
import torch

from nanogpt.evaluate.recite import generate
from nanogpt.model.generate import decode_greedily
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.model.sampler import filter_logits, make_sampler

SETTINGS = [
    dict(zip(("temperature", "top_k", "top_p"), values, strict=True))
    for values in product((0.3, 1.0, 1.7), (None, 1, 5, 40, 1000), (None, 1e-6, 0.1, 0.5, 0.95, 1.0))
]


def their_logits(logits, temperature, top_k, top_p):
    """What transformers makes of logits (B, V)."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = process.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        logits = process.TopKLogitsWarper(top_k)(None, logits)
    return logits if top_p is None else process.TopPLogitsWarper(top_p)(None, logits)


@pytest.mark.parametrize("kind", ["random", "tied", "equal", "masked", "sure"])
def test_the_filters_are_transformers(kind):
    """Reference: transformers' warpers one after another, bit for bit, in 90 settings."""
    logits = 4 * torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    if kind == "tied":
        logits = logits.round()
    elif kind == "equal":
        logits = torch.zeros_like(logits)
    elif kind == "masked":
        logits[:, 3:] = float("-inf")  # as where a prompt is healed
    elif kind == "sure":
        logits[:, 7] = 1000
    for setting in SETTINGS:
        ours = filter_logits(logits, **setting)
        assert torch.equal(ours, their_logits(logits, **setting)), setting
        assert (ours > float("-inf")).any(dim=1).all()


@pytest.mark.parametrize("setting", [{}, {"temperature": 1.5, "top_k": 12, "top_p": 0.9}])
def test_tokens_come_as_often_as_they_should(setting):
    """Reference: the softmax of the filtered logits, by a chi-square test of 2,000 first tokens of continuations."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # some tokens are likelier than others
        wanted = filter_logits(model(torch.tensor([[3, 1, 4]]))[:, -1], **setting).softmax(dim=-1)[0]
    choose, draws = make_sampler(torch.Generator().manual_seed(0), **setting), 2000
    said = [next(generate(model, [3, 1, 4], context_length=8, choose=choose)) for _ in range(draws)]
    found, wanted = torch.tensor(said).bincount(minlength=20), wanted * draws
    assert not found[wanted == 0].any()
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    assert wanted.min() > 5  # fewer, and the statistic is not distributed so
    assert len(wanted) > 5
    assert wanted.max() > 3 * wanted.min()
    chi_square = ((found - wanted) ** 2 / wanted).sum()
    assert torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2), chi_square / 2) > 0.001  # P(more than this)


def test_temperature_0_is_greedy():
    """Reference: greedy decoding, past the context length; of several likeliest tokens the first."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16)).eval()
    choose = make_sampler(torch.Generator(), temperature=0.0, top_p=0.5)
    ours = list(islice(generate(model, [5, 6, 7], context_length=8, choose=choose), 30))
    assert ours == decode_greedily(model, torch.tensor([[5, 6, 7]]), 30, context_length=8)[0][0].tolist()
    assert make_sampler(torch.Generator(), temperature=0.0)(torch.zeros(2, 9)).tolist() == [0, 0]
