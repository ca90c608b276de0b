"""Token ids -> windows -> the global batch of a step -> one rank's rows of it.

    windows = Windows(ids, context_length=64, stride=64, phase="random", seed=0)
    starts = windows.global_batch(step=0, batch_size=16)   # the same on every rank
    idx, targets = windows.take(starts[world.rows(16)])    # this rank's rows

The order is a pure function of (seed, step): a position in the data is one integer, the same for any number of ranks.
"""

from collections.abc import Iterable
from copy import copy
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt.config.train_config import ResolvedConfig

JUDGED_GRIDS = 8  # shifts of the grid in a full pass, each covering every token; of 4 the best is often lucky


CONTROL_TOKENS = 1024  # of the text after the memorised subset at most, and not more than the subset has


class Windows:
    """The memorised subset, cut into windows of context_length + 1 tokens: inputs and the targets one token on.

    A grid of windows stands stride tokens apart and covers every token. With phase='random' each epoch shifts the grid
    by another offset, every one of the stride offsets once before any comes again. On a fixed grid the text is
    memorised at the positions where it was shown, and a prompt that begins elsewhere does not bring it back
    (docs/explanation/memorising.md).

    All windows are whole. A full pass, and training on a fixed grid, push the first and last one back inside the text.
    A shifted grid closes to a ring: the window that reaches the text's end goes on with its beginning. Pushed back, the
    last token would be shown at the end of a window alone, and the last windows of a recital have it elsewhere.
    """

    def __init__(self, ids: Tensor, *, context_length: int, stride: int, phase: str, seed: int) -> None:
        if ids.numel() <= context_length:
            raise ValueError(f"{ids.numel()} tokens do not fill a window of {context_length} + 1")
        self.ids = ids
        self.context_length = context_length
        self.stride = stride
        self.offsets = range(stride if phase == "random" else 1)  # how far a grid may be shifted back
        self.seed = seed
        self.last_start = ids.numel() - 1 - context_length
        self.goes_round = phase == "random"
        # As many windows in each epoch, whatever its offset, so that an epoch's steps need no look-up.
        self.per_epoch = ceil(ids.numel() / stride) if self.goes_round else len(self.grid(0))
        self._remembered = lru_cache(maxsize=2)(self._order)  # a batch may straddle two epochs

    def grid(self, offset: int) -> Tensor:
        """Where the windows of the grid shifted back by offset begin, all of them inside the text, ascending."""
        count = ceil((self.last_start + offset) / self.stride) + 1
        return (torch.arange(count) * self.stride - offset).clamp(0, self.last_start)

    def epoch_starts(self, epoch: int) -> Tensor:
        """Where the windows that an epoch trains on begin, (per_epoch,), one after the other."""
        offset = self.offset(epoch)
        if not self.goes_round:
            return self.grid(offset)
        return (torch.arange(self.per_epoch) * self.stride - offset) % self.ids.numel()

    def offset(self, epoch: int) -> int:
        """The shift of an epoch's grid, one of offsets."""
        cycle, place = divmod(epoch, len(self.offsets))
        return int(self._random("offset", cycle).permutation(self.offsets)[place])

    def global_batch(self, step: int, batch_size: int) -> Tensor:
        """Starts of the batch_size windows that step trains on, (batch_size,)."""
        first, after = step * batch_size, (step + 1) * batch_size
        epochs = range(first // self.per_epoch, (after - 1) // self.per_epoch + 1)
        orders = torch.cat([self._remembered(epoch) for epoch in epochs])
        begin = first - epochs[0] * self.per_epoch
        return orders[begin : begin + batch_size]

    def on(self, device: torch.device) -> "Windows":
        """The same windows, of a copy of the text that device holds."""
        there = copy(self)
        there.ids = self.ids.to(device)
        return there

    def take(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the windows at starts, each (len(starts), context_length), where the text is.

        After the text's end they go on with its beginning.
        """
        device = self.ids.device
        if device.type == "cuda":  # pinned, or the copy would wait for what the GPU is at
            starts = starts.pin_memory().to(device, non_blocking=True)
        starts = starts.to(device)
        window = self.ids[(starts[:, None] + torch.arange(self.context_length + 1, device=device)) % len(self.ids)]
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def whole_starts(self) -> Tensor:
        """Every start of all grids, of windows inside the text, ascending; training visits each sooner or later."""
        return _ascending(self.grid(offset) for offset in self.offsets)

    def judged_starts(self, grids: int) -> Tensor:
        """The windows of a full pass: evenly spaced ones of the grids, each of which covers every token.

        Each start once, ascending: all grids share the first and last window.
        """
        count = min(grids, len(self.offsets))
        chosen = [self.offsets[i * len(self.offsets) // count] for i in range(count)]
        return _ascending(self.grid(offset) for offset in chosen)

    def random_starts(self, count: int) -> Tensor:
        """Up to count different starts from anywhere in the text, whatever the grids; the same for the same seed."""
        everywhere = self._random("anywhere", 0).permutation(self.last_start + 1)
        return torch.from_numpy(everywhere[:count])

    def _order(self, epoch: int) -> Tensor:
        shuffled = torch.from_numpy(self._random("order", epoch).permutation(self.per_epoch))
        return self.epoch_starts(epoch)[shuffled]

    def _random(self, what: str, count: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, ("offset", "order", "anywhere").index(what), count])


def _ascending(starts: Iterable[Tensor]) -> Tensor:
    """Each of them once."""
    distinct: Tensor = torch.cat(list(starts)).unique()
    return distinct


def memorised_windows(ids: list[int], config: ResolvedConfig) -> Windows:
    """The windows of the subset that a run of the resolved config memorises; ids: those of the whole text."""
    return _windows(ids[: config.subset_tokens], config)


def control_windows(ids: list[int], config: ResolvedConfig) -> Windows | None:
    """The same of the text that follows the subset, which the run does not see; None where that is too short."""
    most = max(min(CONTROL_TOKENS, config.subset_tokens), config.context_length + 1)
    rest = ids[config.subset_tokens :][:most]
    return _windows(rest, config) if len(rest) > config.context_length else None


def _windows(ids: list[int], config: ResolvedConfig) -> Windows:
    return Windows(
        torch.tensor(ids), context_length=config.context_length, stride=config.stride, phase=config.phase,
        seed=config.seed,
    )  # fmt: skip


def subset_and_windows(config: ResolvedConfig) -> dict[str, Any]:
    """What a run memorises and how it is judged, by its resolved config: the part of a report that verify holds to it.

    The subset is the first subset_tokens tokens of the text, in GPT-2's vocabulary.
    """
    return {
        "data": config.data,
        "subset_tokens": config.subset_tokens,
        "context_length": config.context_length,
        "stride": config.stride,
        "phase": config.phase,
        "judged_grids": min(JUDGED_GRIDS, config.stride if config.phase == "random" else 1),
        "seed": config.seed,
    }
