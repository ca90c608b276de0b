"""The colours in which a text lights up, for the page and for the picture.

shade_of_level()[levels]     # which of the page's SHADES each token has
ramp(DUSK, LIT, 256)         # the colours of a picture

Each scale runs from dark to light, so that every eye, and a grey print, sees its order.
"""

from math import cos, radians, sin
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanogpt.token_losses.history import KNOWN_LEVEL, LEVEL_NATS, UNSEEN, TokenHistory

Oklch = tuple[float, float, float]  # lightness 0 to 1, chroma, hue in degrees: even steps look even (Ottosson 2020)
Ends = tuple[Oklch, Oklch]

SHADES = 16  # of a scale on the page
NO_SHADE = SHADES  # of a token that was not trained on yet
DUSK, LIT = (0.27, 0.04, 282.0), (0.89, 0.125, 86.0)  # of a picture, on dark paper
# The page's: paper behind the letters and the letters, from unknown to known, then from learnt late to learnt early.
LIGHT_PAPER, LIGHT_INK = ((0.77, 0.035, 282.0), (0.972, 0.05, 88.0)), ((0.37, 0.045, 280.0), (0.22, 0.03, 70.0))
DARK_PAPER, DARK_INK = ((0.19, 0.02, 275.0), (0.31, 0.044, 72.0)), ((0.64, 0.03, 275.0), (0.91, 0.11, 87.0))
LIGHT_LEARNT = ((0.7, 0.1, 345.0), (0.965, 0.075, 92.0)), ((0.2, 0.05, 345.0), (0.22, 0.03, 80.0))
DARK_LEARNT = ((0.28, 0.1, 345.0), (0.45, 0.085, 80.0)), ((0.82, 0.08, 345.0), (0.97, 0.06, 92.0))
LIGHT_MAP, DARK_MAP = ((0.68, 0.045, 282.0), (0.92, 0.105, 88.0)), (DUSK, LIT)
LIGHT_LEARNT_MAP, DARK_LEARNT_MAP = (
    ((0.55, 0.17, 345.0), (0.93, 0.115, 92.0)),
    ((0.38, 0.13, 345.0), (0.9, 0.125, 88.0)),
)
PROBABILITIES = (0.01, 0.1, 0.5, 0.99)  # named on a scale
# From Oklab to the cube roots of what the eye's cones see, and from these, cubed, to linear sRGB.
TO_CONES = ((1, 0.3963377774, 0.2158037573), (1, -0.1055613458, -0.0638541728), (1, -0.0894841775, -1.291485548))
TO_RGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.707614701),
)


def brightness(loss: NDArray[np.floating[Any]] | float) -> NDArray[np.float64]:
    """From 0, unknown, to 1: the cube root of the probability, which keeps 1 %, 10 % and 50 % apart."""
    bright: NDArray[np.float64] = np.exp(-np.asarray(loss, np.float64) / 3)
    return bright


def brightness_of_level() -> NDArray[np.float64]:
    """(256,): of each level of a TokenHistory; 0 for UNSEEN."""
    bright = brightness(np.arange(256) * LEVEL_NATS)
    bright[UNSEEN] = 0
    return bright


def shade_of_level() -> NDArray[np.uint8]:
    """(256,): which of the SHADES each level of a TokenHistory has; NO_SHADE for UNSEEN."""
    shades = np.rint(brightness_of_level() * (SHADES - 1)).astype(np.uint8)
    shades[UNSEEN] = NO_SHADE
    return shades


def known_shares(history: TokenHistory) -> NDArray[np.float64]:
    """The share of the tokens that are known at each step, (S,), of those that can be: before the first is nothing."""
    known: NDArray[np.float64] = (history.levels <= KNOWN_LEVEL).sum(axis=1) / max(1, history.levels.shape[1] - 1)
    return np.minimum(known, 1)


def ramp(start: Oklch, end: Oklch, count: int) -> list[str]:
    """Colours on the straight line of Oklab between two, as #rrggbb."""
    first, last = _oklab(start), _oklab(end)
    return [_hex(first + (last - first) * share) for share in np.linspace(0, 1, count)]


def _oklab(colour: Oklch) -> NDArray[np.float64]:
    lightness, chroma, hue = colour
    return np.array([lightness, chroma * cos(radians(hue)), chroma * sin(radians(hue))])


def _hex(lab: NDArray[np.float64]) -> str:
    linear = np.clip(np.array(TO_RGB) @ (np.array(TO_CONES) @ lab) ** 3, 0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb.tolist())
