"""Records during a run how well each token is known; it costs no forward: each step's own losses are kept.

recorder = open_recorder(config, windows, world, out_dir, begun_at=0, say=print)
recorder.count(step, engine.losses.newest())        # after each step
recorder.record(step)                               # at each row of metrics.jsonl
"""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import ResolvedConfig
from nanogpt.data.windows import Windows
from nanogpt.distributed.world import World
from nanogpt.token_losses.history import MEMORY_NPZ, MOST_TOKENS, UNSEEN, TokenHistory, levels_of

PERIOD_S = 1.0  # between two writings of the file, at least
LITTLE = 8  # tokens before one in its window with which nobody can know it: what it was with more context stays
REST = 200.0  # times as long as the last one took, likewise: they take half a percent of the time at most


class TokenLossRecorder:
    """One rank's. Every rank must build it, and call count and record at the same steps."""

    def __init__(
        self,
        config: ResolvedConfig,
        windows: Windows,
        world: World,
        out_dir: Path,
        *,
        history: TokenHistory,
        say: Callable[[str], None],
    ) -> None:
        """windows: the plan's, on the CPU. history: what memory.npz of the first rank is to begin with."""
        self._windows, self._world, self._batch_size = windows, world, config.batch_size
        self._path, self._history, self._say = out_dir / MEMORY_NPZ, history, say
        tokens = len(windows.ids)
        self._levels = history.levels[-1].copy() if len(history.steps) else np.full(tokens, UNSEEN, np.uint8)
        # Of older steps nothing is left to see: each token has come again, twice at least.
        most_steps = 2 * windows.per_epoch // config.batch_size + 2
        self._steps: deque[tuple[int, Tensor]] = deque(maxlen=most_steps if tokens <= MOST_TOKENS else 0)
        self._save_from = 0.0  # time.monotonic()
        self._has_failed = False

    def count(self, step: int, losses: Tensor) -> None:
        """losses: (rows, T) of this rank's rows of a step, counted from 1, which the caller gives away."""
        self._steps.append((step, losses))

    def record(self, step: int) -> None:
        """Add a row to the history, with the newest loss of each token on any rank that it had with some context."""
        if not self._steps:  # a run that goes on at this step, whose row was made before
            return
        steps, losses = zip(*self._steps, strict=True)
        self._steps.clear()
        every = losses[0].new_zeros(len(steps), self._batch_size, losses[0].shape[1])
        every[:, self._world.rows(self._batch_size)] = torch.stack(losses)
        self._world.sum_tensor(every)
        if not self._world.is_first:
            return
        for number, levels in zip(steps, levels_of(every.cpu().numpy()), strict=True):
            self._take(number, levels)
        self._history = self._history.with_row(step, self._levels)
        if time.monotonic() >= self._save_from:
            self.save()

    def _take(self, step: int, levels: NDArray[np.uint8]) -> None:
        """The levels (B, T) of a step's windows, counted from 1."""
        starts = self._windows.global_batch(step - 1, self._batch_size).numpy()
        for context in range(1, levels.shape[1] + 1):  # where windows overlap, the last one written has the most
            token, level = starts + context, levels[:, context - 1]
            known = (context < LITTLE) & (token >= LITTLE) & (self._levels[token] != UNSEEN)
            self._levels[token[~known]] = level[~known]

    def save(self, recital: tuple[str, str, str] | None = None) -> None:
        """Write memory.npz now, on the first rank. What fails costs one line, never the run.

        recital: at the end of the run, as TokenHistory has it.
        """
        if not self._world.is_first or not len(self._history.steps):
            return
        started = time.monotonic()
        try:
            self._history.with_recital(recital).save(self._path)
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                self._say(f"warning: {self._path} cannot be written ({error.strerror or error}); going on")
            self._has_failed = True
        now = time.monotonic()
        self._save_from = now + max(PERIOD_S, REST * (now - started))


def open_recorder(
    config: ResolvedConfig,
    windows: Windows,
    world: World,
    out_dir: Path,
    *,
    begun_at: int,
    say: Callable[[str], None],
) -> TokenLossRecorder:
    """That of a run which goes on after a step, with the rows of memory.npz up to it, if there are any; 0: a new one.

    Every rank must call, with the windows on the CPU.
    """
    tokens = len(windows.ids)
    history = TokenHistory.empty(tokens)
    path = out_dir / MEMORY_NPZ
    if world.is_first and tokens > MOST_TOKENS:
        say(f"{MEMORY_NPZ} is for texts of {MOST_TOKENS:,} tokens at most: this run writes none")
    if world.is_first and begun_at:
        try:
            found = TokenHistory.load(path).until(begun_at)
            if found.levels.shape[1] != tokens:
                raise ConfigError(f"{path} is of another text")
            history = found
        except ConfigError as error:
            say(f"warning: {error}; it begins anew")
    return TokenLossRecorder(config, windows, world, out_dir, history=history, say=say)
