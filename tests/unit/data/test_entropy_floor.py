"""The entropy floor against the definition, and against known figures."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from nanogpt.config.train_config import TrainConfig
from nanogpt.data.entropy_floor import ROOM, Floors, entropy_floor
from nanogpt.data.tokenizer import encode
from nanogpt.data.windows import Windows


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
    [(64, 64, 0.0421, 4), (64, 1, 0.1002, 4), (32, 32, 0.1014, 4), (32, 1, 0.200, 3), (1024, 1, 0.006, 3)],
)
def test_tiny_shakespeare(tiny_shakespeare, length, stride, expected, digits):
    """Reference: figures computed elsewhere with explicit prefix counts, to the digits that they were given with."""
    ids = torch.tensor(encode(tiny_shakespeare.read_text()))
    windows = Windows(ids, context_length=length, stride=stride, phase="fixed", seed=0)
    floor = entropy_floor(ids.numpy(), windows.whole_starts().numpy(), length)
    assert floor == pytest.approx(expected, abs=0.51 * 10**-digits)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(16384, (0.0136, 0.0195, 0.0246, 0.0590)), (65536, (0.0276, 0.0339, 0.0400, 0.0782))],
)
def test_subsets_of_tiny_shakespeare(tiny_shakespeare, tokens, expected):
    """Reference: the same figures for its first tokens, blocks of 64 at strides 64, 32, 16 and 1, to 1e-4."""
    ids = np.array(encode(tiny_shakespeare.read_text())[:tokens])
    found = [entropy_floor(ids, np.arange(0, tokens - 64, stride), 64) for stride in (64, 32, 16, 1)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_random_phase_visits_every_offset(tiny_shakespeare):
    """Invariant: the floor of --phase=random is that of stride 1, whatever the stride."""
    ids = np.array(encode(tiny_shakespeare.read_text()))
    config = TrainConfig(subset_tokens=len(ids), stride=64)
    assert Floors(ids).floor_of(config) == pytest.approx(0.1002, abs=1e-4)
    assert Floors(ids).floor_of(config) == entropy_floor(ids, np.arange(len(ids) - 64), 64)


def test_remedies_are_what_they_say(tiny_shakespeare):
    """Reference: the definition on the proposed windows; invariant: the next shorter context would not do."""
    ids = np.array(encode(tiny_shakespeare.read_text())[:3000])
    config = TrainConfig(subset_tokens=3000, context_length=16, stride=16, target_loss=0.1)
    floors = Floors(ids)
    assert floors.floor_of(config) > 0.1
    remedies = [remedy.removeprefix("--").split(" (floor ") for remedy in floors.remedies(config)]
    assert [words[0].split("=")[0] for words in remedies] == ["context_length", "phase", "subset_tokens", "target_loss"]
    (context, floor), (phase, fixed_floor), (subset, subset_floor), (target,) = remedies
    length = int(context.split("=")[1])
    everywhere = np.arange(3000 - length)
    assert float(floor[:-1]) == pytest.approx(by_definition(ids.tolist(), everywhere.tolist(), length), abs=6e-5)
    assert float(floor[:-1]) <= ROOM * 0.1 < entropy_floor(ids, np.arange(3000 - length + 8), length - 8)
    assert phase == "phase=fixed"
    assert float(fixed_floor[:-1]) <= ROOM * 0.1
    tokens = int(subset.split("=")[1])
    assert float(subset_floor[:-1]) == pytest.approx(entropy_floor(ids, np.arange(tokens - 16), 16), abs=6e-5)
    assert floors.floor_of(config) <= ROOM * float(target.split("=")[1])
