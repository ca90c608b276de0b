"""The lines of recall.png: the text in cells of fixed width, and beneath them what was said in place of what was lost.

    sheet = lay_out(pieces)
    [[line.said for line in column if isinstance(line, Line)] for column in sheet.columns]

A text that is too long for one picture is shown from its beginning and around losses from all over it; a Gap stands for
what is left out between.
"""

import unicodedata
from dataclasses import dataclass, field
from itertools import groupby

from nanogpt.plots.recall_map import Piece, is_lost

SHEET_WIDTH = 185  # characters, over all columns
GUTTER = 4  # characters between columns
MAX_ROWS = 100  # of a column
LEAST_WIDTH, MOST_WIDTH = 36, 78  # of a column, characters
BEGINNING = 1 / 3  # of the rows of a picture that cannot hold all
CLOSE = 3  # pieces between the losses that one stretch of said words covers, and not more
MOST_IN_A_ROW = 8  # lines with losses
AROUND = 1  # lines shown before and after a loss
SAID_SIZE = 0.875  # of what was said, relative to the text
NEWLINE, TAB, BLANK, MORE = "↵", "⇥", "␣", "…"


@dataclass(frozen=True)
class Cell:
    """A piece, or as much of it as stands in one line."""

    piece: Piece
    column: int  # where it begins, in characters
    width: int
    text: str  # as it is drawn; a newline only where it was lost


@dataclass(frozen=True)
class Said:
    """What the model said in place of the text above it."""

    column: float
    text: str


@dataclass
class Line:
    """A line of cells and, where any of them was lost, a second row with what was said."""

    cells: list[Cell] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)

    @property
    def end(self) -> int:
        """In characters."""
        return self.cells[-1].column + self.cells[-1].width if self.cells else 0

    @property
    def rows(self) -> int:
        return 2 if self.said else 1


@dataclass(frozen=True)
class Gap:
    """The tokens from first to before end, which are not shown."""

    first: int
    end: int

    rows = 1


@dataclass(frozen=True)
class Sheet:
    """Columns of lines, each width characters wide."""

    columns: list[list[Line | Gap]]
    width: int


def lay_out(pieces: list[Piece]) -> Sheet:
    """All of the text, or as much of it as a picture holds."""
    lengths = sorted(len(line) for line in "".join(piece.text for piece in pieces).split("\n"))
    most = lengths[len(lengths) * 19 // 20]  # 19 of 20 lines stay whole
    count = (SHEET_WIDTH + GUTTER) // (min(max(most, LEAST_WIDTH), MOST_WIDTH) + GUTTER)
    width = (SHEET_WIDTH + GUTTER) // count - GUTTER
    return Sheet(_fill(select(set_lines(pieces, width), count * MAX_ROWS), count), width)


def set_lines(pieces: list[Piece], width: int) -> list[Line]:
    """The text in lines of at most width characters, broken between pieces where that is possible."""
    lines = [Line()]
    for piece in pieces:
        for number, part in enumerate(piece.text.split("\n")):
            if number:
                lines[-1].cells.append(Cell(piece, lines[-1].end, 1, NEWLINE if is_lost(piece) else ""))
                lines.append(Line())
            _put(lines, piece, visible(part), width)
    if not lines[-1].cells:
        lines.pop()
    begun = None
    for line in lines:
        begins = []
        for cell in line.cells:
            if cell.piece is not begun:
                begins.append(cell)
            begun = cell.piece
        line.said = _said(begins, width)
    return lines


def visible(text: str) -> str:
    """text without characters that have no picture."""
    if text.isprintable():
        return text
    text = text.replace("\n", NEWLINE).replace("\t", TAB)
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" else c for c in text)


def columns_of(text: str) -> int:
    """How many cells of a terminal text takes."""
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _put(lines: list[Line], piece: Piece, text: str, width: int) -> None:
    """text, which is of piece, into the last line or, where it does not fit, into new ones."""
    if lines[-1].cells and lines[-1].end + columns_of(text) > width:
        lines.append(Line())
    while text:
        fitting = len(text)
        while columns_of(text[:fitting]) > width:
            fitting -= 1
        part, text = text[:fitting], text[fitting:]
        lines[-1].cells.append(Cell(piece, lines[-1].end, columns_of(part), part))
        if text:
            lines.append(Line())


def _said(cells: list[Cell], width: int) -> list[Said]:
    """What was said in place of the pieces that begin at cells, all of one line; losses close to each other in one.

    Moved left where there is no room before the next or the end of the line, and cut where that does not help.
    """
    stretches: list[list[int]] = []
    for i, cell in enumerate(cells):
        if is_lost(cell.piece):
            if not stretches or i - stretches[-1][-1] > CLOSE:
                stretches.append([])
            stretches[-1].append(i)
    starts = [cells[stretch[0]].column for stretch in stretches]
    ends = [start - 1 for start in starts[1:]] + [width] * bool(starts)
    placed, free = [], 0.0
    for stretch, column, end in zip(stretches, starts, ends, strict=True):
        pieces = [cell.piece for cell in cells[stretch[0] : stretch[-1] + 1]]
        said = b"".join(piece.said if is_lost(piece) else piece.text.encode() for piece in pieces)
        text = visible(said.decode(errors="backslashreplace"))
        text = text if text.strip() else BLANK * len(text)
        start = max(free, min(column, end - SAID_SIZE * columns_of(text)))
        while SAID_SIZE * columns_of(text) > end - start and text != MORE:
            text = text.removesuffix(MORE)[:-1] + MORE
        placed.append(Said(start, text))
        free = start + SAID_SIZE * columns_of(text) + 1
    return placed


def select(lines: list[Line], rows: int) -> list[Line | Gap]:
    """As many lines as rows hold: all; or the beginning, and losses from evenly over the whole text."""
    if sum(line.rows for line in lines) <= rows:
        return list(lines)
    shown: set[int] = set()
    left = rows - 1  # for a gap at the end
    for i in range(len(lines)):
        if lines[i].rows > left - (1 - BEGINNING) * rows:
            break
        shown.add(i)
        left -= lines[i].rows
    places = _losses(lines)
    for i in _spread(len(places)):
        new = [i for i in places[i] if i not in shown]
        cost = sum(lines[i].rows for i in new) + 1  # for a gap before it
        if cost > left:
            break
        shown.update(new)
        left -= cost
    for i in range(len(lines)):  # the beginning again, with what is left
        if i not in shown:
            if lines[i].rows > left:
                break
            shown.add(i)
            left -= lines[i].rows
    return _with_gaps(lines, shown)


def _losses(lines: list[Line]) -> list[range]:
    """Lines in a row that hold losses, not many in one, each with the lines around it."""
    places: list[list[int]] = []
    for i, line in enumerate(lines):
        if line.said:
            if not places or i > places[-1][-1] + 1 or len(places[-1]) == MOST_IN_A_ROW:
                places.append([])
            places[-1].append(i)
    return [range(max(0, p[0] - AROUND), min(len(lines), p[-1] + AROUND + 1)) for p in places]


def _with_gaps(lines: list[Line], shown: set[int]) -> list[Line | Gap]:
    """The lines shown, and a Gap for those between, unless one would take as many rows."""
    items: list[Line | Gap] = []
    for is_shown, numbers in groupby(range(len(lines)), key=shown.__contains__):
        group = list(numbers)
        if is_shown or (len(group) == 1 and lines[group[0]].rows == Gap.rows):
            items += [lines[i] for i in group]
        else:
            first, last = lines[group[0]].cells[0].piece, lines[group[-1]].cells[-1].piece
            items.append(Gap(first.token, last.token + last.tokens))
    return items


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning lies evenly among them."""
    return sorted(range(count), key=lambda i: int(f"{i:032b}"[::-1], 2))


def _fill(items: list[Line | Gap], count: int) -> list[list[Line | Gap]]:
    """Items one below the other in at most count columns, as low as that allows."""
    height = -(-sum(item.rows for item in items) // count)
    while True:
        columns: list[list[Line | Gap]] = []
        free = 0
        for item in items:
            if item.rows > free:
                columns.append([])
                free = height
            columns[-1].append(item)
            free -= item.rows
        if len(columns) <= count:
            return columns
        height += 1
