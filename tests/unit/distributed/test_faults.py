"""What an injected fault does to a model; tests/runs shows what a run makes of a kill, a freeze and a full disk."""

import time

import pytest
import torch

from nanogpt.config.fault import KINDS, Fault
from nanogpt.distributed.faults import ACTIONS, SLOWER_S, InjectedFault
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.utils.phases import Phases

IDX = torch.arange(8).view(1, 8)


@pytest.fixture
def step():
    """step(KIND, NUMBER) is the gradients of a step of a small model that has this fault in step 2."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=211, block_size=8, n_layer=1, n_head=2, n_embd=32))
    phases = {}

    def of(kind, number):
        if kind not in phases:
            phases[kind] = Phases(InjectedFault(Fault(kind, 0, 2), model, list(model.parameters())))
        model.zero_grad()
        with phases[kind]("forward and backward", number):
            model(IDX, IDX).backward()
        with phases[kind]("update", number):
            return [parameter.grad.clone() for parameter in model.parameters()]

    of.model = model
    return of


def test_every_kind_has_its_action():
    """Invariant: what the option names is what there is."""
    assert tuple(ACTIONS) == KINDS


@pytest.mark.parametrize(("kind", "is_spoilt"), [("nan", torch.isnan), ("drop_gradient", lambda g: g == 0)])
def test_a_gradient_is_spoilt_once(step, kind, is_spoilt):
    """Reference: the gradients of the steps before and after it, which are alike."""
    before, spoilt, after = (step(kind, number) for number in (1, 2, 3))
    assert all(is_spoilt(gradient).all() for gradient in spoilt)
    assert any(gradient.any() for gradient in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_bit_is_flipped(step):
    """Invariant: of one weight, which changes by half of itself or less, and stays so."""
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    for number in (1, 2, 3):
        step("flip", number)
    pairs = [(a, b) for a, b in zip(before, step.model.parameters(), strict=True) if not torch.equal(a, b)]
    ((old, new),) = pairs
    (changed,) = (old != new).flatten().nonzero()
    was, is_now = old.flatten()[changed], new.detach().flatten()[changed]
    assert (was.view(torch.int32) ^ is_now.view(torch.int32)).item().bit_count() == 1
    assert 0 < (was - is_now).abs() <= 0.5 * was.abs()


def test_a_rank_is_slow_from_a_step_on(step, monkeypatch):
    """Invariant: each forward from there on takes longer."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for number in (1, 2, 3):
        step("slow", number)
    assert slept == [SLOWER_S] * 2
