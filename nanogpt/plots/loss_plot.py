"""The loss of one run, or of several, as a picture: against steps and against time.

figure = draw([read_curve("runs/a"), read_curve("runs/b")])
save(figure, Path("loss.png"))
"""

import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec, module_from_spec
from math import isfinite, log10
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from nanogpt.config.files import whole
from nanogpt.plots.run_history import Curve, name_differences

if TYPE_CHECKING:  # importing it takes half a second, which a run without pictures need not wait for
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Dash = Literal["-", "--", "-.", ":"]
FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's, which every eye tells apart, without the yellow that white paper swallows; then again, dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":")
GREY = "#666666"
LABEL_WIDTH = 125  # characters that fit beside each other under the panels
TITLE_WIDTH = 110
FAR = 10.0  # a floor that is further below the target would press the curves together: it is said, not drawn
_one_thread = Lock()


@contextmanager
def plain_matplotlib() -> Iterator[None]:
    """Within it matplotlib draws in its own style and in silence, whatever a person has set; after it that is back.

    One thread at a time: those settings are the process's.
    """
    logger = logging.getLogger("matplotlib")
    with _one_thread:
        level = logger.level
        logger.setLevel(logging.ERROR)  # it tells of its caches, and of lines in matplotlibrc
        # Letters that its font lacks. By module, so that a notebook's own pictures still warn.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning, r"nanogpt\.")
        try:
            matplotlib = _import_matplotlib()
            settings = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
            with matplotlib.rc_context(settings):  # a backend, which nothing here uses, would import pyplot
                yield
        finally:
            logger.setLevel(level)


def _import_matplotlib() -> ModuleType:
    """matplotlib, also where a matplotlibrc in another encoding or a backend that is not installed here forbid it."""
    try:
        import matplotlib
    except ImportError:
        raise
    except Exception:
        for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
            del sys.modules[name]  # of the half import
        backend = os.environ.pop("MPLBACKEND", None)
        spec = find_spec("matplotlib")
        assert spec is not None
        assert spec.loader is not None
        matplotlib = sys.modules[spec.name] = module_from_spec(spec)
        # Of the module alone: it looks in the working directory first, which no variable prevents.
        vars(matplotlib)["open"] = partial(open, errors="replace")
        try:
            spec.loader.exec_module(matplotlib)
        except BaseException:
            del sys.modules[spec.name]
            raise
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
    return matplotlib


@plain_matplotlib()
def draw(curves: Sequence[Curve]) -> "Figure":
    """Two panels, the logarithm of the loss over steps and over time. Each curve must have a row."""
    from matplotlib.figure import Figure  # no pyplot: that keeps every figure, and wants the main thread
    from matplotlib.lines import Line2D

    styles = [(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i in range(len(curves))]
    names = [
        textwrap.fill(f"{name}: {curve.outcome}", LABEL_WIDTH)
        for name, curve in zip(name_differences(curves), curves, strict=True)
    ]
    legend_lines = sum(name.count("\n") + 1 for name in names) if len(curves) > 1 else 0
    figure = Figure(figsize=(10, 4.4 + 0.2 * legend_lines), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    unit, unit_s = _unit(max(curve.wall_s[-1] for curve in curves))
    for curve, (colour, dash) in zip(curves, styles, strict=True):
        for panel, x in zip(panels, (curve.steps, [s / unit_s for s in curve.wall_s]), strict=True):
            panel.plot(x, curve.loss, color=colour, linestyle=dash, linewidth=1.1)
            panel.plot(x, curve.full_pass_loss, "o", markersize=4, markerfacecolor="white", color=colour)
    lines = _draw_lines(panels, curves, styles)
    _scale(panels, curves)
    panels[0].set(xlabel="step", ylabel="loss (nats/token)")
    panels[1].set(xlabel=f"time in training ({unit})")
    training = Line2D([], [], color=GREY, linewidth=1.1, label="training loss")
    passes = Line2D([], [], color=GREY, linestyle="", marker="o", markersize=4, markerfacecolor="white")
    passes.set_label("full pass")
    panels[1].legend(handles=[training, passes, *lines], loc="upper right", fontsize="small")
    if len(curves) == 1:
        title = f"{curves[0].text}; {curves[0].outcome}"
        texts = [figure.suptitle(textwrap.fill(title, TITLE_WIDTH), fontsize="medium")]
    else:
        runs = [Line2D([], [], color=c, linestyle=dash, label=n) for n, (c, dash) in zip(names, styles, strict=True)]
        texts = figure.legend(handles=runs, loc="outside lower left", fontsize="small", frameon=False).get_texts()
    for text in texts:
        text.set_parse_math(False)  # a $ in a name is a $
    return figure


@plain_matplotlib()
def save(figure: "Figure", path: Path) -> None:
    """Write a picture, whole or not at all, in the format that the path's ending, one of FORMATS, names."""
    with whole(path) as file:  # two processes may draw the same
        figure.savefig(file, format=path.suffix[1:])


def _draw_lines(
    panels: Sequence["Axes"], curves: Sequence[Curve], styles: Sequence[tuple[str, Dash]]
) -> list["Line2D"]:
    """Target and entropy floor across the panels, in the colour of their run where runs differ -> for the legend."""
    from matplotlib.lines import Line2D

    handles = []
    for what, levels, dash in (
        ("target", [curve.target for curve in curves], (0, (5, 3))),
        ("entropy floor", [curve.floor for curve in curves], (0, (1, 2))),
    ):
        one = len(set(levels)) == 1
        near = {
            (level, GREY if one else colour)
            for level, curve, (colour, _) in zip(levels, curves, styles, strict=True)
            if level >= curve.target / FAR
        }
        for level, colour in near:
            for panel in panels:
                panel.axhline(level, color=colour, linestyle=dash, linewidth=1.0)
        label = (f"{what} {levels[0]:.3g}" if one else f"{what} of each run") + " (below)" * (not near)
        handles.append(Line2D([], [], color=GREY, linestyle=dash, linewidth=1.0, label=label))
    return handles


def _scale(panels: Sequence["Axes"], curves: Sequence[Curve]) -> None:
    """A logarithmic loss axis with readable numbers, and x axes from 0."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    shown = [c.target for c in curves] + [c.floor for c in curves if c.floor >= c.target / FAR]
    for curve in curves:
        shown += [loss for loss in (*curve.loss, *curve.full_pass_loss) if isfinite(loss) and loss > 0]
    bottom, top = min(shown) / 1.3, max(shown) * 1.3
    subs = (1.0, 2.0, 5.0) if log10(top / bottom) < 4 else (1.0,)
    for panel in panels:
        panel.set(yscale="log", ylim=(bottom, top), xlim=(0, None))
        panel.yaxis.set(
            major_locator=LogLocator(subs=subs), major_formatter=FuncFormatter(lambda loss, _: f"{loss:g}"),
            minor_locator=NullLocator(),
        )  # fmt: skip
        panel.grid(color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)


def _unit(longest_s: float) -> tuple[str, float]:
    """(name, seconds) of the unit that suits a time axis."""
    return ("s", 1.0) if longest_s < 180 else ("min", 60.0) if longest_s < 3 * 3600 else ("h", 3600.0)
