"""loss.png of a run that goes on, drawn beside it.

logger = LivePlot(out_dir, say=console.say)     # out_dir/loss.png is redrawn every minute
logger.result(report, recitation)               # and for the last time
"""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

from nanogpt.config.errors import one_line
from nanogpt.monitor.loggers import Logger, Recitation, Row
from nanogpt.plots.loss_plot import draw, save
from nanogpt.plots.run_history import read_curve
from nanogpt.storage.report import Report

LOSS_PNG = "loss.png"
PERIOD_S = 60.0
REST = 50.0  # times as long as the last drawing took, at least: it may take 2 % of the interpreter's time, no more


class LivePlot(Logger):
    """A thread that draws what metrics.jsonl holds. A picture that cannot be drawn costs one line, never the run."""

    def __init__(self, out_dir: Path, say: Callable[[str], None], *, period_s: float = PERIOD_S) -> None:
        """say: how to tell a person what failed."""
        self._out_dir, self._say, self._period_s = out_dir, say, period_s
        self._over = Event()
        self._has_failed = False
        self._thread = Thread(target=self._repeat, daemon=True)
        self._thread.start()

    def row(self, row: Row) -> None:
        pass  # it is in metrics.jsonl

    def say(self, text: str) -> None:
        pass

    def result(self, report: Report, recitation: Recitation | None) -> None:
        self.close()
        self._draw()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _repeat(self) -> None:
        rest_s = self._period_s
        while not self._over.wait(rest_s):
            started = time.perf_counter()
            self._draw()
            rest_s = max(self._period_s, REST * (time.perf_counter() - started))

    def _draw(self) -> None:
        try:
            curve = read_curve(str(self._out_dir))
            if curve.steps:
                save(draw([curve]), self._out_dir / LOSS_PNG)
        except Exception as error:  # no matplotlib, one that does not work, a full disk: they have no common base
            if not self._has_failed:
                self._say(f"warning: {LOSS_PNG} could not be drawn ({one_line(error)}); going on")
            self._has_failed = True
