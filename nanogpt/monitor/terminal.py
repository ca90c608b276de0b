"""A run on a terminal: sentences scroll by, and at the foot stand the newest figures and the way to the target.

logger = TerminalLogger(target_loss=0.099)
logger.row(row)
"""

import math
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nanogpt.monitor.loggers import Logger, Row, describe_eta, describe_full_pass

BARS = "▁▂▃▄▅▆▇█"
SPARKS = 32  # columns of the curve


class TerminalLogger(Logger):
    """Says what PlainLogger says, on lines that stay where they are."""

    def __init__(self, target_loss: float, losses: Sequence[float] = (), console: Console | None = None) -> None:
        """losses: of the rows that a resumed run has logged already."""
        self._target_loss = target_loss
        self._losses = [loss for loss in losses if loss > 0]
        self._console = console or Console()
        # Redrawn when there is something new, by whoever brings it: no thread beside the training.
        self._live = Live(Text("warming up"), console=self._console, auto_refresh=False, redirect_stderr=False)
        self._live.start()
        self._console.show_cursor(True)  # that rich hides: whatever ends this process does not have to bring it back

    def row(self, row: Row) -> None:
        if math.isfinite(row.loss) and row.loss > 0:
            self._losses.append(row.loss)
        self._live.update(self._foot(row), refresh=True)

    def say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def _foot(self, row: Row) -> Group:
        # The training loss may be below the target long before, or after, a full pass is: only that one has arrived.
        is_verified = row.eta_s == 0
        way = 1.0 if is_verified else min(0.99, way_to_target(self._losses, self._target_loss))
        first = Table.grid(padding=(0, 1))
        first.add_row(
            Text(f"step {row.step:,}", style="bold"),
            f"loss {row.loss:.4f}",
            Text(sparkline(self._losses), style="cyan"),
        )
        second = Table.grid(padding=(0, 1))
        second.add_row(
            ProgressBar(completed=100 * way, width=24), f"{way:.0%} of the way to {self._target_loss:g} nats/token"
        )
        figures = [f"{row.tokens_per_s:,.0f} tokens/s", f"{row.step_s:.3g} s a step"]
        if row.mfu is not None and math.isfinite(row.mfu):
            figures.append(f"MFU {row.mfu:.0%}")
        figures.append(f"{row.memory_bytes / 1e9:.1f} GB")
        if eta := describe_eta(row):
            figures.append(eta)
        if full_pass := describe_full_pass(row):
            figures.append(full_pass)
        return Group(first, second, Text(" · ".join(figures)))


def way_to_target(losses: Sequence[float], target_loss: float) -> float:
    """How far the loss has fallen from its first value to the target, on its logarithm; from 0 to 1."""
    if not losses:
        return 0.0
    if losses[-1] <= target_loss:
        return 1.0
    first = max(losses[0], losses[-1])
    return math.log(first / losses[-1]) / math.log(first / target_loss)


def sparkline(losses: Sequence[float]) -> str:
    """The curve in one line of text, on the logarithm of the loss, at most SPARKS columns wide."""
    if not losses:
        return ""
    columns = min(SPARKS, len(losses))
    logs = [math.log(losses[(i + 1) * len(losses) // columns - 1]) for i in range(columns)]
    low, height = min(logs), max(logs) - min(logs)
    return "".join(BARS[round((len(BARS) - 1) * (log - low) / height) if height else 0] for log in logs)
