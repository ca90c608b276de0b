"""The loss and throughput of the steps between two logged rows.

meter = Meter()
meter.add(loss_sum=5300.0, tokens=1024, seconds=1.7)
loss, tokens_per_s = meter.take()
"""

from math import nan


class Meter:
    """Adds up global loss sums and token counts; the mean is over tokens, so unequal steps weigh as they should."""

    def __init__(self) -> None:
        self.tokens = 0  # trained on since the start
        self._reset()

    def add(self, loss_sum: float, tokens: int, seconds: float) -> None:
        """One step: its loss sum over all ranks (nats), its tokens over all ranks, this rank's seconds in it."""
        self.tokens += tokens
        self._loss_sum += loss_sum
        self._tokens += tokens
        self._seconds += seconds

    def take(self) -> tuple[float, float]:
        """Mean loss (nats/token) and tokens/s since the last take, NaN where no step was added; then start afresh."""
        loss = self._loss_sum / self._tokens if self._tokens else nan
        tokens_per_s = self._tokens / self._seconds if self._seconds else nan
        self._reset()
        return loss, tokens_per_s

    def _reset(self) -> None:
        self._loss_sum, self._tokens, self._seconds = 0.0, 0, 0.0
