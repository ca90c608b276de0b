"""recall.png: the memorised text, token by token, as the model recites it.

save_recall(out_dir, card.recited, headline("builtin", report), say=console.say)   # out_dir/recall.png
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nanogpt.config.errors import one_line
from nanogpt.evaluate.recall import RecitedText
from nanogpt.plots.loss_plot import plain_matplotlib, save
from nanogpt.plots.recall_layout import GUTTER, SAID_SIZE, SHEET_WIDTH, Gap, Line, Sheet, lay_out
from nanogpt.plots.recall_map import COLOURS, Mark, cut, marks, overview, tally
from nanogpt.storage.run_dir import RECALL_PNG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lengths in pixels, downwards from the top left corner.
DPI = 100
CHARACTER = 7.0  # wide
FONT = CHARACTER / 0.602 * 72 / DPI  # points: a character of DejaVu Sans Mono is 0.602 em wide
ROW, SAID_ROW = 15.0, 13.0
Box = tuple[float, float, float, float]  # left, top, width, height
MARGIN = 24.0
TITLE, LEGEND, STRIP_AT, STRIP, TICKS = 22.0, 74.0, 96.0, 28.0, 22.0
# Both come with matplotlib; the second has letters that the first lacks.
MONO = ("DejaVu Sans Mono", "DejaVu Sans")
INK, FAINT, SAID_INK = "#1A1A1A", "#6B6B6B", "#A33A00"
UNDERLINE = {Mark.PREDICTED: "#A67C00", Mark.WRONG: "#8C2F00"}  # a second sign beside the colour


def save_recall(out_dir: Path, recited: RecitedText, title: list[str], say: Callable[[str], None]) -> None:
    """Draw out_dir/recall.png. Where that fails one line tells a person: the run is worth more."""
    try:
        save(draw_recall(recited, title), out_dir / RECALL_PNG)
    except Exception as error:  # no matplotlib, one that does not work, a full disk: they have no common base
        say(f"warning: {RECALL_PNG} could not be drawn ({one_line(error)}); going on")


@plain_matplotlib()
def draw_recall(recited: RecitedText, title: list[str]) -> "Figure":
    """The text as a heat map under an overview of all of it; beneath a loss stands what was said instead."""
    from matplotlib.figure import Figure

    mark = marks(recited)
    sheet = lay_out(cut(recited))
    text_at = STRIP_AT + STRIP + TICKS + 12
    width = 2 * MARGIN + SHEET_WIDTH * CHARACTER
    height = text_at + max(sum(_height(item) for item in column) for column in sheet.columns) + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for number, line in enumerate(title):
        _text(axes, MARGIN, TITLE + 20 * number, line, size=10.5 if number == 0 else 9)
    _draw_legend(axes, mark)
    _draw_overview(axes, mark, sheet)
    _draw_sheet(axes, mark, sheet, text_at)
    return figure


def _draw_legend(axes: "Axes", mark: Tensor) -> None:
    x = MARGIN
    for which, label in tally(mark).items():
        _boxes(axes, [(x, LEGEND - 6, 14, 12)], COLOURS[which])
        if which in UNDERLINE:
            _boxes(axes, [(x, LEGEND + 4, 14, 2)], UNDERLINE[which])
        _text(axes, x + 20, LEGEND, label, size=9)
        x += 44 + 6.3 * len(label)
    _text(axes, x, LEGEND, "in this ink: what the model said instead", size=9, color=SAID_INK)


def _draw_overview(axes: "Axes", mark: Tensor, sheet: Sheet) -> None:
    """All tokens in one strip, losses at its foot; the line under it shows which of them are drawn below."""
    from matplotlib.ticker import MaxNLocator

    width = SHEET_WIDTH * CHARACTER
    heights = overview(mark, int(width)).numpy() * STRIP
    column = width / len(heights)
    tops = np.hstack([np.zeros((len(heights), 1)), heights.cumsum(axis=1)])
    for which in Mark:
        has = heights[:, which].nonzero()[0]
        boxes = [(MARGIN + i * column, STRIP_AT + tops[i, which], column, heights[i, which]) for i in has]
        _boxes(axes, boxes, COLOURS[which])
    per_token = width / len(mark)
    for token in MaxNLocator(8, integer=True).tick_values(0, len(mark)):
        if 0 <= token <= len(mark):
            x, foot = MARGIN + token * per_token, STRIP_AT + STRIP
            axes.plot([x, x], [foot, foot + 5], color=FAINT, linewidth=0.8)
            _text(axes, x, foot + 13, f"{token:,.0f}", size=7.5, color=FAINT, ha="center" if token else "left")
    gaps = [item for items in sheet.columns for item in items if isinstance(item, Gap)]
    if gaps:
        ends = [0, *(end for gap in gaps for end in (gap.first, gap.end)), len(mark)]
        shown = [(first * per_token, end * per_token) for first, end in zip(ends[::2], ends[1::2], strict=True)]
        _boxes(axes, [(MARGIN + a, STRIP_AT + STRIP + 1, max(1, b - a), 3) for a, b in shown if a < b], INK)


def _draw_sheet(axes: "Axes", mark: Tensor, sheet: Sheet, top: float) -> None:
    boxes: dict[Mark, list[Box]] = {which: [] for which in Mark}
    underlines: dict[Mark, list[Box]] = {which: [] for which in UNDERLINE}
    for number, column in enumerate(sheet.columns):
        left, y = MARGIN + number * (sheet.width + GUTTER) * CHARACTER, top
        for item in column:
            if isinstance(item, Gap):
                _text(axes, left, y + ROW / 2, _gap(item, mark), size=8, color=FAINT, style="italic")
            else:
                for cell in item.cells:
                    x, which = left + cell.column * CHARACTER, cell.piece.mark
                    width = max(0, cell.width * CHARACTER - 1)  # a pixel between tokens, so that they can be counted
                    boxes[which].append((x, y + 0.5, width, ROW - 1))
                    if which in UNDERLINE:
                        underlines[which].append((x, y + ROW - 2, width, 1.5))
                for start, text in _texts(item):
                    _mono(axes, left + start * CHARACTER, y + ROW / 2, text, INK, 1.0)
                for said in item.said:
                    _mono(axes, left + said.column * CHARACTER, y + ROW + SAID_ROW / 2, said.text, SAID_INK, SAID_SIZE)
            y += _height(item)
    for which in Mark:
        _boxes(axes, boxes[which], COLOURS[which])
    for which in UNDERLINE:
        _boxes(axes, underlines[which], UNDERLINE[which])


def _gap(gap: Gap, mark: Tensor) -> str:
    lost = int((mark[gap.first : gap.end] > Mark.RECITED).sum())
    return f"· · ·  {gap.end - gap.first:,} tokens, " + (f"{lost:,} of them not recited" if lost else "all recited")


def _height(item: Line | Gap) -> float:
    return ROW + (item.rows - 1) * SAID_ROW


def _texts(line: Line) -> Iterator[tuple[int, str]]:
    """(column, text) of a line. Cells of ASCII stand in one text; others, whose letters may be wider, in their own."""
    for is_ascii, alike in groupby(line.cells, key=lambda cell: cell.text.isascii()):
        cells = list(alike)
        for group in [cells] if is_ascii else [[cell] for cell in cells]:
            text = "".join(cell.text.ljust(cell.width) if is_ascii else cell.text for cell in group)
            yield group[0].column + len(text) - len(text.lstrip(" ")), text.strip(" ")


def _mono(axes: "Axes", x: float, y: float, text: str, colour: str, size: float) -> None:
    _text(axes, x, y, text, size=FONT * size, color=colour, family=MONO)


def _text(axes: "Axes", x: float, y: float, text: str, **style: Any) -> None:
    """style: as matplotlib's Text takes it."""
    if text:
        ours: dict[str, Any] = {"color": INK, "va": "center_baseline", "parse_math": False}
        axes.text(x, y, text, **(ours | style))


def _boxes(axes: "Axes", boxes: Sequence[Box], colour: str) -> None:
    """Rectangles in one colour."""
    from matplotlib.collections import PolyCollection

    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes]
    axes.add_collection(PolyCollection(corners, facecolors=colour, linewidths=0, antialiaseds=False), autolim=False)
