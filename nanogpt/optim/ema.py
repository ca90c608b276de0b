"""An exponential moving average of weights.

average = EMA(engine.local_weights(), decay=0.97)
average.update()
with average.applied(): ...
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """An exponential moving average of weights, which full passes judge in their place.

    At a rate that still learns, each step remembers its own windows better than the others'; the mean of the last
    1 / (1 - decay) weights remembers all of them (Polyak and Juditsky, 1992). weights: what this rank holds of them, in
    any dtype; the average is kept in fp32.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self._weights = list(weights)
        self._mean: list[Tensor] = []  # as long as nothing has been averaged
        self._decay = decay

    @property
    def mean(self) -> list[Tensor]:
        """The average, laid out as the weights are; empty when nothing has been averaged."""
        return self._mean

    def begin(self) -> list[Tensor]:
        """Room for an average that is read from elsewhere -> the tensors to fill."""
        self._mean = [torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) for weight in self._weights]
        return self._mean

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now into the average."""
        now = [weight.float() for weight in self._weights]  # themselves, where they are fp32
        if not self._mean:
            self._mean = [weight.detach().clone() for weight in now]
        torch._foreach_lerp_(self._mean, now, 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the weights' place inside, the weights again after; nothing when nothing was averaged."""
        kept = [weight.detach().clone() for weight in self._weights] if self._mean else []
        _write(self._weights, self._mean)
        try:
            yield
        finally:
            _write(self._weights, kept)


@torch.no_grad()
def _write(weights: list[Tensor], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=False):  # values is empty where there is nothing to write
        weight.copy_(value)
