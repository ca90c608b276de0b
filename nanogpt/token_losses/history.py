"""How well each token of the memorised text was known during a run: what memory.npz holds.

history = TokenHistory.empty(tokens=2048).with_row(10, levels_of(losses))
history.save(out_dir / MEMORY_NPZ)
TokenHistory.load(out_dir / MEMORY_NPZ).learnt_at()
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import regular, whole

MEMORY_NPZ = "memory.npz"
LEVEL_NATS = 0.05  # a loss is kept as a whole number of these
MOST_LEVEL = 254  # for 12.7 nats and all above, and for what is not finite
UNSEEN = 255  # not trained on yet; the first token always, as nothing in the text is before it
KNOWN_LEVEL = int(log(2) / LEVEL_NATS)  # below ln 2 the probability is above 1/2: no other token is likelier
MOST_ROWS = 512  # of a history: a slider has no more places
MOST_BYTES = 2**24  # of its levels
MOST_TOKENS = MOST_BYTES // 8  # of a text that has one


@dataclass(frozen=True)
class TokenHistory:
    """S rows of a run over a text of N tokens: each token's newest training loss at that step."""

    steps: NDArray[np.int64]  # (S,), ascending
    levels: NDArray[np.uint8]  # (S, N), in LEVEL_NATS; UNSEEN where the token was not trained on yet
    recital: tuple[str, str, str] | None = None  # at the end: the prompt, what the model went on with, the verdict

    @classmethod
    def empty(cls, tokens: int) -> "TokenHistory":
        """That of a run that begins."""
        return cls(np.zeros(0, np.int64), np.zeros((0, tokens), np.uint8))

    @classmethod
    def load(cls, path: Path) -> "TokenHistory":
        """What save() wrote. Raises ConfigError where there is none, or it is damaged."""
        try:
            with open(path, "rb", opener=regular) as file, np.load(file, allow_pickle=False) as arrays:
                history = cls(arrays["steps"].astype(np.int64), arrays["levels"])
                if arrays["recital"].size:
                    prompt, recited, verdict = arrays["recital"].tolist()
                    history = replace(history, recital=(prompt, recited, verdict))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file: the run has logged no step, or was of an older version") from None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ConfigError(f"{path} is damaged ({error})") from None
        fit = history.steps.ndim == 1 and history.levels.ndim == 2 and len(history.steps) == len(history.levels)
        if not fit or history.levels.dtype != np.uint8:
            raise ConfigError(f"{path} is damaged: its arrays do not fit together")
        return history

    def save(self, path: Path) -> None:
        """Write it whole, or leave path as it was. Raises OSError."""
        with whole(path) as file:
            np.savez(file, steps=self.steps, levels=self.levels, recital=np.array(self.recital or (), str))

    def with_row(self, step: int, levels: NDArray[np.uint8]) -> "TokenHistory":
        """It with one more row."""
        return TokenHistory(np.append(self.steps, step), np.concatenate([self.levels, levels[None]]))

    def until(self, step: int) -> "TokenHistory":
        """Its rows up to a step, from which a run goes on."""
        count = int(np.searchsorted(self.steps, step, side="right"))
        return TokenHistory(self.steps[:count], self.levels[:count])

    def learnt_at(self) -> NDArray[np.int64]:
        """The step from which on each token is known in every row, (N,); -1 where it is not in the newest."""
        if not len(self.steps):
            return np.full(self.levels.shape[1], -1)
        since = np.logical_and.accumulate(self.levels[::-1] <= KNOWN_LEVEL)[::-1]  # (S, N)
        return np.where(since[-1], self.steps[since.argmax(axis=0)], -1)


def row_to_drop(steps: Sequence[int], tokens: int) -> int | None:
    """Which of the rows at steps, ascending, a history of so many tokens loses: the one whose neighbours are closest.

    Never the first or the last; None where there is room for all.
    """
    if len(steps) <= min(MOST_ROWS, MOST_BYTES // tokens):
        return None
    return 1 + int((np.array(steps[2:]) - np.array(steps[:-2])).argmin())


def levels_of(losses: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Cross-entropies, nats, as levels; one that is not finite is the highest."""
    scaled = np.nan_to_num(losses / LEVEL_NATS, nan=MOST_LEVEL, posinf=MOST_LEVEL)
    levels: NDArray[np.uint8] = np.clip(np.rint(scaled), 0, MOST_LEVEL).astype(np.uint8)
    return levels
