"""Pictures of a run that goes on, drawn beside it from the files that it writes: loss.png and memory.html.

logger = live_plot(out_dir, say=console.say)    # out_dir/loss.png is redrawn every minute
logger.result(report, recitation)               # and for the last time
"""

import time
from collections.abc import Callable, Sequence
from math import inf, isfinite
from pathlib import Path
from threading import Event, Thread

from nanogpt.config.errors import one_line
from nanogpt.monitor.loggers import Logger, Recitation, Row
from nanogpt.plots.loss_plot import draw, save
from nanogpt.plots.run_history import read_curve
from nanogpt.storage.report import Report
from nanogpt.storage.run_dir import MEMORY_PNG
from nanogpt.token_losses.draw import MEMORY_HTML, draw_page, draw_picture

LOSS_PNG = "loss.png"
PLOT_S, PAGE_S = 60.0, 2.0  # from one drawing to the next, at least
REST = 50.0  # times as long as the last drawing took, at least: it may take 2 % of the interpreter's time, no more


class LivePicture(Logger):
    """A thread that draws a file. A picture that cannot be drawn costs one line, never the run."""

    def __init__(self, name: str, draw: Callable[[bool], None], say: Callable[[str], None], *, period_s: float) -> None:
        """draw: given whether the run goes on. say: how to tell a person what failed.

        period_s: inf, at the end alone.
        """
        self._name, self._draw_file, self._say, self._period_s = name, draw, say, period_s
        self._over = Event()
        self._has_failed = False
        self._thread = Thread(target=self._repeat, daemon=True)
        if isfinite(period_s):
            self._thread.start()

    def row(self, row: Row) -> None:
        pass  # it is in metrics.jsonl

    def say(self, text: str) -> None:
        pass

    def result(self, report: Report, recitation: Recitation | None) -> None:
        self.close()
        self._draw(goes_on=False)

    def died(self, error: BaseException) -> None:
        self.close()  # the directory may be another run's by now

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _repeat(self) -> None:
        rest_s = self._period_s
        while not self._over.wait(rest_s):
            started = time.perf_counter()
            self._draw(goes_on=True)
            rest_s = max(self._period_s, REST * (time.perf_counter() - started))

    def _draw(self, *, goes_on: bool) -> None:
        try:
            self._draw_file(goes_on)
        except Exception as error:  # no matplotlib, one that does not work, a full disk: they have no common base
            if not self._has_failed:
                self._say(f"warning: {self._name} could not be drawn ({one_line(error)}); going on")
            self._has_failed = True


def live_plot(out_dir: Path, say: Callable[[str], None], *, period_s: float = PLOT_S) -> LivePicture:
    """loss.png in out_dir."""

    def draw_loss(goes_on: bool) -> None:
        curve = read_curve(str(out_dir))
        if curve.steps:
            save(draw([curve]), out_dir / LOSS_PNG)

    return LivePicture(LOSS_PNG, draw_loss, say, period_s=period_s)


def live_page(
    out_dir: Path, tokens: Sequence[bytes], say: Callable[[str], None], *, period_s: float = PAGE_S
) -> LivePicture:
    """memory.html in out_dir; tokens: of the memorised text."""
    return LivePicture(MEMORY_HTML, lambda goes_on: draw_page(out_dir, tokens, goes_on=goes_on), say, period_s=period_s)


def memory_picture(out_dir: Path, say: Callable[[str], None]) -> LivePicture:
    """memory.png in out_dir, when the run is over."""
    return LivePicture(MEMORY_PNG, lambda _: draw_picture(out_dir), say, period_s=inf)
