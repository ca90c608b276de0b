"""Records during a run how well each token is known; it costs no forward: each step's own losses are kept.

recorder = open_recorder(config, windows, world, out_dir, begun_at=0, say=print)
recorder.count(step, engine.losses)                 # after each step
recorder.record(step)                               # at each row of metrics.jsonl
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import ResolvedConfig
from nanogpt.data.windows import Windows
from nanogpt.distributed.world import World
from nanogpt.engine.base import StepLosses
from nanogpt.token_losses.history import MEMORY_NPZ, MOST_TOKENS, UNSEEN, TokenHistory, levels_of, row_to_drop

PERIOD_S = 1.0  # between two writings of the file, at least
LITTLE = 8  # tokens of context, a quarter of a window at most, that say too little: what a token was with more stays
WAITING_VALUES = 2**22  # losses of steps that wait for the next row, on all ranks together, at most: 16 MiB
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
        self._path, self._say = out_dir / MEMORY_NPZ, say
        self._rows = list(zip(history.steps.tolist(), history.levels, strict=True))  # each made once, and never copied
        tokens = len(windows.ids)
        self._is_on = tokens <= MOST_TOKENS
        self._levels = self._rows[-1][1].copy() if self._rows else np.full(tokens, UNSEEN, np.uint8)
        self._waiting: list[tuple[int, Tensor]] = []  # steps that are not in levels yet
        self._little = max(1, min(LITTLE, config.context_length // 4))
        self._most_waiting = max(1, WAITING_VALUES // (config.batch_size * config.context_length))
        self._save_from = 0.0  # time.monotonic()
        self._has_failed = False

    def count(self, step: int, losses: StepLosses) -> None:
        """losses: of this rank's rows of a step, counted from 1, which is the newest."""
        if self._is_on:
            self._waiting.append((step, losses.newest()))
            if len(self._waiting) >= self._most_waiting:
                self._gather()

    def record(self, step: int) -> None:
        """Add a row to the history, with the newest loss of each token on any rank that it had with some context."""
        if self._waiting:
            self._gather()
        if not self._world.is_first or not self._is_on or (self._rows and self._rows[-1][0] >= step):
            return
        if (gone := row_to_drop([*(at for at, _ in self._rows), step], len(self._levels))) is not None:
            del self._rows[gone]
        self._rows.append((step, self._levels.copy()))
        if time.monotonic() >= self._save_from:
            self.save()

    def _gather(self) -> None:
        """Take what waits on every rank into the levels of the first one. Every rank must call."""
        steps, losses = zip(*self._waiting, strict=True)
        self._waiting.clear()
        every = losses[0].new_zeros(len(steps), self._batch_size, losses[0].shape[1])
        every[:, self._world.rows(self._batch_size)] = torch.stack(losses)
        self._world.sum_tensor(every)
        if self._world.is_first:
            self._take(steps, levels_of(every.cpu().numpy()))

    def _take(self, steps: tuple[int, ...], levels: NDArray[np.uint8]) -> None:
        """The levels (S, B, T) of the windows of steps, counted from 1."""
        starts = np.stack([self._windows.global_batch(step - 1, self._batch_size).numpy() for step in steps])
        # In the order of steps and, within one, of context: of several values for a token the last one stays, which in
        # windows that overlap has the most context, as when the text is recited.
        token = (starts[:, None, :] + np.arange(1, levels.shape[2] + 1)[:, None]) % len(self._levels)  # (S, T, B)
        level = levels.transpose(0, 2, 1)
        first = self._little - 1
        little = token[:, :first]
        is_all = self._levels[little] == UNSEEN
        if not self._windows.goes_round:
            is_all |= little <= first  # the first tokens of the text never have more
        self._levels[little[is_all]] = level[:, :first][is_all]
        self._levels[token[:, first:].ravel()] = level[:, first:].ravel()
        self._levels[0] = UNSEEN  # it is shown after the text's end, which is not how the text begins

    def save(self, recital: tuple[str, str, str] | None = None) -> None:
        """Write memory.npz now, on the first rank. What fails costs one line, never the run.

        recital: at the end of the run, as TokenHistory has it.
        """
        if not self._world.is_first or not self._rows:
            return
        started = time.monotonic()
        try:
            steps, levels = zip(*self._rows, strict=True)
            TokenHistory(np.array(steps, np.int64), np.stack(levels), recital).save(self._path)
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
    if world.is_first and not begun_at:
        with suppress(OSError):
            path.unlink()  # of an attempt that came to no checkpoint
    elif world.is_first:
        try:
            found = TokenHistory.load(path).until(begun_at)
            if found.levels.shape[1] != tokens:
                raise ConfigError(f"{path} is of another text")
            history = found
        except ConfigError as error:
            say(f"warning: {error}; it begins anew")
    recorder = TokenLossRecorder(config, windows, world, out_dir, history=history, say=say)
    recorder.save()  # without what is of another end, which the page would show until the first row
    return recorder
