"""When will the target be reached? A point and an interval, or honestly nothing.

steps_to_target([(10, 5.2), (20, 4.1), (30, 3.0), (40, 2.2)], target=0.099)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np

MIN_POINTS = 4  # two lines through fewer points say nothing


@dataclass(frozen=True)
class Eta:
    """Steps still to go: the best guess and the two extrapolations that it lies between."""

    steps: float
    low: float
    high: float


def steps_to_target(history: Sequence[tuple[int, float]], target: float) -> Eta | None:
    """Extrapolate (step, mean loss) pairs, oldest first, to target; None while the loss does not fall.

    The later half of the history is continued once as a straight line of the loss and once of its logarithm. A loss
    that falls fast and then bends to its floor ends between the two, so the guess is their geometric mean.
    """
    recent = history[len(history) // 2 :]
    if len(recent) < MIN_POINTS:
        return None
    if recent[-1][1] <= target:
        return Eta(0.0, 0.0, 0.0)
    steps = np.array([step for step, _ in recent], dtype=float)
    losses = np.array([loss for _, loss in recent])
    linear = _crossing(steps, losses, target)
    log_linear = _crossing(steps, np.log(losses), log(target))
    if linear is None or log_linear is None:
        return None
    return Eta(sqrt(linear * log_linear), min(linear, log_linear), max(linear, log_linear))


def _crossing(steps: np.ndarray, values: np.ndarray, target: float) -> float | None:
    """Steps from the last of `steps` to where the least-squares line meets target; None if it does not fall."""
    slope, now = np.polyfit(steps - steps[-1], values, deg=1)
    if slope >= 0:
        return None
    return max(1.0, (target - float(now)) / float(slope))
