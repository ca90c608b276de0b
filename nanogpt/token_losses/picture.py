"""memory.png: how a text lit up over a run, as one picture: each token from left to right, each step downwards.

save(draw_memory(history, read_curve("runs/a"), title="2,048 tokens of builtin"), out_dir / MEMORY_PNG)
"""

from math import isfinite, log
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanogpt.plots.loss_plot import plain_matplotlib
from nanogpt.plots.run_history import Curve
from nanogpt.token_losses import scale
from nanogpt.token_losses.history import UNSEEN, TokenHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 1024  # of the heat map, at most
PAPER, INK, FAINT, EDGE, LOSS = "#0b0d12", "#e9e7e1", "#9aa1ae", "#2a2f3a", "#8fb0ee"


@plain_matplotlib()
def draw_memory(history: TokenHistory, curve: Curve, *, title: str) -> "Figure":
    """The heat map, and beside it, at the same steps, the share of tokens known and the loss. history: with a row."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, NullLocator

    colours = LinearSegmentedColormap.from_list("dusk to lit", scale.ramp(scale.DUSK, scale.LIT, 256))
    figure = Figure(figsize=(12, 6), dpi=120, facecolor=PAPER, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    heat, share, loss = figure.subplots(1, 3, sharey=True, width_ratios=(9, 1.6, 1.6))
    steps, tokens = history.steps.tolist(), history.levels.shape[1]
    last = max(steps[-1], steps[0] + 1)
    rows = _at_even_steps(history.steps, pooled(history.levels), steps[0], last)
    heat.imshow(
        rows, cmap=colours.with_extremes(bad=PAPER), vmin=0, vmax=1, aspect="auto", extent=(0, tokens, last, steps[0])
    )
    share.fill_betweenx(steps, 100 * scale.known_shares(history), color=colours(1.0), linewidth=0)
    shown = [(x, y) for x, y in zip(curve.steps, curve.loss, strict=True) if isfinite(y) and y > 0 and x <= last]
    loss.plot([y for _, y in shown], [x for x, _ in shown], color=LOSS, linewidth=1.6)
    loss.axvline(curve.target, color=FAINT, linestyle=(0, (1, 2)), linewidth=1.2)
    loss.set_xscale("log")
    loss.xaxis.set(major_formatter=FuncFormatter(lambda nats, _: f"{nats:g}"), minor_locator=NullLocator())
    heat.set(ylabel="step", xlabel="place in the text (tokens)", ylim=(last, steps[0]))
    share.set(xlabel="tokens known (%)", xlim=(0, 100))
    loss.set(xlabel="loss (nats/token)")
    for panel in (heat, share, loss):
        _dress(panel)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), colours),
        ax=heat,
        location="top",
        aspect=50,
        shrink=0.6,
        anchor=(0, 0),
        pad=0.02,
    )
    bar.set_ticks(
        [float(scale.brightness(-log(p))) for p in scale.PROBABILITIES],
        labels=[f"{100 * p:g} %" for p in scale.PROBABILITIES],
    )
    bar.set_label("probability that the model gives each token", color=FAINT, fontsize="small")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=FAINT, length=0, labelsize="small")
    figure.suptitle(title, color=INK, fontsize="large", x=0.015, ha="left").set_parse_math(False)  # a $ is a $
    return figure


def pooled(levels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Levels (S, N) as the mean brightness of at most COLUMNS stretches, (S, C); NaN where a stretch was not seen."""
    bright = scale.brightness_of_level()
    tokens = levels.shape[1]
    starts = np.unique(np.arange(COLUMNS) * tokens // COLUMNS)
    rows = []
    for row in levels:  # one at a time: of a long text they do not fit beside each other
        seen = np.add.reduceat((row != UNSEEN).astype(np.float64), starts)
        rows.append(np.where(seen, np.add.reduceat(bright[row], starts) / np.maximum(seen, 1), np.nan))
    return np.array(rows)


def _at_even_steps(steps: NDArray[np.int64], rows: NDArray[np.float64], first: int, last: int) -> NDArray[np.float64]:
    """Rows (S, C) as a picture's lines, evenly over the steps: a history may be sparser in its older half."""
    lines = np.linspace(first, last, 512)
    return rows[np.searchsorted(steps, lines, side="right") - 1]


def _dress(panel: "Axes") -> None:
    panel.set_facecolor(PAPER)
    panel.tick_params(colors=FAINT, length=0, labelsize="small")
    panel.xaxis.label.set(color=FAINT, fontsize="small")
    panel.yaxis.label.set(color=FAINT, fontsize="small")
    for edge in panel.spines.values():
        edge.set_color(EDGE)
