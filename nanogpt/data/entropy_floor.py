"""Before training: can any model reach the target on these windows, and on which windows could it?

floor = entropy_floor(ids, starts, context_length=64)   # nats per token
remedies = Floors(ids).remedies(config)                 # ["--context_length=136 (floor 0.0472)", ...]
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, log10
from typing import Any

import numpy as np
import torch

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.data.windows import Windows

ROOM = 0.5  # of the target that a remedy's floor may be; the nearest that a recorded run came to its floor is 0.58


def entropy_floor(ids: np.ndarray, starts: np.ndarray, context_length: int) -> float:
    """The lowest mean loss, in nats per token, that any model can have on the windows of ids (N,) at starts (W,).

    The first tokens of a window have little context, and no model can predict what the windows leave open. The best
    possible model gives each next token its share among the windows that began alike; over a window these shares
    multiply to count(window) / count(first token), so the sum over positions telescopes and no prefix needs counting.
    """
    return Floors(ids).floor(starts, context_length)


class Floors:
    """The entropy floors of one text, ids (N,), on whatever windows; what these have in common is computed once."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids = ids
        self._names = {1: _name(ids)}

    def floor(self, starts: np.ndarray, context_length: int) -> float:
        """entropy_floor of the windows at starts (W,)."""
        first, whole = (self._named(length)[starts] for length in (1, context_length + 1))
        return (_sum_n_log_n(first) - _sum_n_log_n(whole)) / (len(starts) * context_length)

    def floor_of(self, config: ResolvedConfig) -> float:
        """entropy_floor of the windows inside the text of all grids of a resolved config."""
        windows = Windows(
            torch.from_numpy(self._ids[: config.subset_tokens]),
            context_length=config.context_length, stride=config.stride, phase=config.phase, seed=config.seed,
        )  # fmt: skip
        return self.floor(windows.whole_starts().numpy(), config.context_length)

    def remedies(self, config: ResolvedConfig) -> list[str]:
        """The options that would each, alone, make the target of a resolved config reachable, with the floor then.

        The shortest context (a multiple of 8), a grid that stands or stands wider, the longest beginning of the text
        and the lowest target (to two digits). Each leaves the floor at ROOM of the target at most.
        """

        def changed(name: str, value: Any) -> ResolvedConfig:
            follows = name == "context_length" and config.stride == config.context_length
            return replace(config, **{name: value}, **({"stride": value} if follows else {}))

        def reachable(name: str, value: Any) -> bool:
            return self.floor_of(changed(name, value)) <= ROOM * config.target_loss

        longest = min(config.block_size, config.subset_tokens - 1)
        shorter = (m * 10**k for k in range(int(log10(config.subset_tokens))) for m in range(10, 100))
        values: dict[str, Sequence[Any]] = {
            "context_length": range(8 * (config.context_length // 8 + 1), longest + 1, 8),
            "phase": ["fixed"] if config.phase == "random" else [],
            "stride": range(config.stride + 1, config.context_length + 1) if config.phase == "fixed" else [],
            "subset_tokens": [n for n in shorter if config.context_length < n < config.subset_tokens][::-1],
        }
        found = {name: _first(each, partial(reachable, name)) for name, each in values.items()}
        remedies = [
            f"--{name}={value} (floor {self.floor_of(changed(name, value)):.4f})"
            for name, value in found.items()
            if value is not None
        ]
        lowest = self.floor_of(config) / ROOM
        unit = 10.0 ** (int(np.floor(log10(lowest))) - 1)
        return [*remedies, f"--target_loss={ceil(lowest / unit) * unit:.6g}"]

    def _named(self, length: int) -> np.ndarray:
        """For each place a number that stands for the `length` tokens from there on: alike only where they are alike.

        (N - length + 1,), exact, by doubling: a stretch is named by the names of two shorter ones that cover it (Karp,
        Miller and Rosenberg, 1972), so that a long context needs no more memory than a short one.
        """
        if length not in self._names:
            half = 1 << ((length - 1).bit_length() - 1)  # the largest power of two below length
            names, count = self._named(half), len(self._ids) - length + 1
            self._names[length] = _name(names[:count] * len(self._ids) + names[length - half :][:count])
        return self._names[length]


def _name(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _sum_n_log_n(names: np.ndarray) -> float:
    """Over the counts n of each name."""
    counts = np.bincount(names)
    counts = counts[counts > 1]
    return float((counts * np.log(counts)).sum())


def _first(values: Sequence[Any], holds: Callable[[Any], bool]) -> Any:
    """The first of values that holds, where all after it hold too, by bisection; None where the last does not."""
    if not values or not holds(values[-1]):
        return None
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(values[middle]) else (middle + 1, high)
    return values[high]
