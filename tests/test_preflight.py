"""The entropy floor against the definition, and against known figures."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from nanogpt.data import Windows
from nanogpt.preflight import entropy_floor
from nanogpt.tokenizer import encode


def by_definition(ids, starts, length):
    """Mean over windows and positions of -ln(share of the next token among the windows with the same beginning)."""
    windows = [tuple(ids[s : s + length + 1]) for s in starts]
    counts = Counter(w[:i] for w in windows for i in range(1, length + 2))
    terms = [-math.log(counts[w[: i + 1]] / counts[w[:i]]) for w in windows for i in range(1, length + 1)]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_it_telescopes_to_the_definition(stride):
    """Reference: prefix counts at every position, on a text of few words."""
    ids = np.random.default_rng(0).integers(0, 3, 300)
    starts = np.arange(0, 300 - 8, stride)
    assert entropy_floor(ids, starts, 8) == pytest.approx(by_definition(ids.tolist(), starts.tolist(), 8), abs=1e-12)


def test_distinct_windows_have_no_floor():
    """Invariant: where the first token decides the window, the floor is 0."""
    assert entropy_floor(np.arange(100), np.arange(0, 90, 3), 8) == 0.0


@pytest.mark.parametrize(
    ("length", "stride", "expected", "digits"),
    [(64, 64, 0.0421, 4), (64, 1, 0.1002, 4), (32, 32, 0.1014, 4), (32, 1, 0.200, 3)],
)
def test_tiny_shakespeare(tiny_shakespeare, length, stride, expected, digits):
    """Reference: figures computed elsewhere with explicit prefix counts, to the digits that they were given with."""
    ids = torch.tensor(encode(tiny_shakespeare.read_text()))
    windows = Windows(ids, context_length=length, stride=stride, phase="fixed", seed=0)
    floor = entropy_floor(ids.numpy(), windows.trained_starts().numpy(), length)
    assert floor == pytest.approx(expected, abs=0.51 * 10**-digits)
