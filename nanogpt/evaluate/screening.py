"""Whether a text comes back, found out in a quicker precision than the one that decides.

right = sure(read(model, windows, starts, exact), exact.dtype)
screened = screen(model, windows, starts, quick, exact, part=slice(32, 64), enough=lambda best: best.right.all())
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from nanogpt.data.windows import Windows
from nanogpt.evaluate.recall import Forward, Reading, read
from nanogpt.evaluate.scorecard import ROUNDINGS
from nanogpt.model.gpt import GPT


def sure(reading: Reading, dtype: str) -> Reading:
    """A reading in dtype, in which what other kernels may turn is wrong."""
    return replace(reading, right=reading.right & (reading.margin >= ROUNDINGS[dtype].margin))


def at_best(reading: Reading, dtype: str) -> Reading:
    """A reading in dtype, in which what other kernels may turn is right."""
    return replace(reading, right=reading.right | (reading.margin < ROUNDINGS[dtype].margin))


@dataclass(frozen=True)
class Screened:
    """What screen() found."""

    reading: Reading
    read_again: int  # windows


def screen(
    model: GPT,
    windows: Windows,
    starts: Tensor,
    quick: Forward,
    exact: Forward,
    *,
    part: slice,
    enough: Callable[[Reading], bool],
) -> Screened:
    """A quick reading of the windows at starts, in which those with a near tie in part are read again exactly.

    They are only where that matters: where the reading is enough with each near tie won. What is right then is sure in
    the exact precision too, but for a rare window that rounding has moved by more than it usually does. Every rank must
    call.
    """
    found = read(model, windows, starts, quick)
    doubtful = (found.margin[:, part] < ROUNDINGS[quick.dtype].margin).any(dim=1)
    if not enough(at_best(found, quick.dtype)) or not doubtful.any():
        return Screened(found, 0)
    again = sure(read(model, windows, starts[doubtful], exact), exact.dtype)
    right, margin, nll = found.right.clone(), found.margin.clone(), found.nll.clone()
    right[doubtful], margin[doubtful], nll[doubtful] = again.right, again.margin, again.nll
    return Screened(Reading(right, margin, nll), int(doubtful.sum()))
