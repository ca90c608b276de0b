"""One page of HTML with the memorised text as the model recites it, for a browser; it needs no other file.

page = make_page(card.recited, headline("builtin", report))

What the model said is kept as JSON beside the text, so that pieces which came back alike are one element, and the whole
of Tiny Shakespeare stays a page that a browser can scroll.
"""

import codecs
import html
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import groupby

from nanogpt.evaluate.recall import RecitedText
from nanogpt.plots.recall_map import COLOURS, Mark, Piece, cut, is_lost, marks, overview, tally

CLASSES = {Mark.GIVEN: "g", Mark.RECITED: "r", Mark.PREDICTED: "p", Mark.WRONG: "w"}
COLUMNS = 1000  # of the overview
BLOCK = 256  # pieces, at least, of a part that a browser can lay out by itself
NUL, ITS_PICTURE = "\0", "\N{SYMBOL FOR NULL}"  # HTML cannot hold the former


def make_page(recited: RecitedText, title: list[str]) -> str:
    """The page; the text of its element <main> is the memorised text."""
    mark, pieces = marks(recited), cut(recited)
    heights = overview(mark, COLUMNS).tolist()
    names = tally(mark)
    parts = {
        "title": html.escape(title[0]),
        "scores": html.escape(title[1]),
        "light": " ".join(f"--{which.name.lower()}: {colour};" for which, colour in COLOURS.items()),
        "legend": "".join(_legend(CLASSES[which], label) for which, label in names.items()),
        "columns": str(len(heights)),
        "last": str(len(heights) - 1),
        "overview": "".join(f'<path class="{CLASSES[which]}" d="{_path(heights, which)}"/>' for which in Mark),
        "text": "".join(map(_block, _blocks(pieces))),
        "data": json.dumps(_data(pieces, len(mark), len(heights)), ensure_ascii=False, separators=(",", ":"))
        .replace("<", "\\u003c"),
    }  # fmt: skip
    template = (files("nanogpt") / "assets" / "recall.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _legend(name: str, label: str) -> str:
    what, count = label.split(":", 1)
    return f'<li><span class="{name}">{what}</span>{count}</li>'


def _blocks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Parts that end with a line, because a block ends one in a browser."""
    block = []
    for piece in pieces:
        block.append(piece)
        if len(block) >= BLOCK and piece.text.endswith("\n"):
            yield block
            block = []
    if block:
        yield block


def _block(pieces: list[Piece]) -> str:
    runs = (
        f'<span class="{CLASSES[which]}">{_text("".join(p.text for p in run), lost=which > Mark.RECITED)}</span>'
        for which, run in groupby(pieces, key=lambda piece: piece.mark)
    )
    return f"<div>{''.join(runs)}</div>"


def _text(text: str, *, lost: bool) -> str:
    """text as HTML that a browser reads back as it was. A newline that was lost gets an element, to be seen."""
    escaped = html.escape(text.replace(NUL, ITS_PICTURE), quote=False).replace("\r", "&#13;")
    return escaped.replace("\n", "<i>\n</i>") if lost else escaped


def _path(heights: list[list[float]], which: Mark) -> str:
    """The boxes of one Mark in the overview, as SVG; equal neighbours in one."""
    path, column = [], 0

    def box(shares: list[float]) -> tuple[float, float]:
        return round(100 * sum(shares[:which]), 1), round(100 * shares[which], 1)

    for height, same in groupby(heights, key=box):
        width = len(list(same))
        if height[1]:
            path.append(f"M{column} {height[0]:g}h{width}v{height[1]:g}h-{width}z")
        column += width
    return "".join(path)


def _data(pieces: list[Piece], tokens: int, columns: int) -> dict[str, object]:
    """What the page's script reads; it says there what is what."""
    places: list[int] = []
    hops = []
    character = 0  # UTF-16 code units, as JavaScript counts
    for _, members in groupby(pieces, key=lambda piece: piece.hop):
        group = list(members)
        lengths = [len(piece.text.encode("utf-16-le")) // 2 for piece in group]
        if any(map(is_lost, group)):
            hops.append([group[0].token, character, lengths, [piece.tokens for piece in group], _said(group)])
        for piece, length in zip(group, lengths, strict=True):
            while len(places) < columns and len(places) * tokens < (piece.token + piece.tokens) * columns:
                places.append(character)
            character += length
    return {"tokens": tokens, "places": places, "hops": hops}


def _said(hop: list[Piece]) -> list[str | None]:
    """What was said in place of each piece of a hop, None where it came back.

    A character whose bytes are spread over several pieces stands in the last of them, and the others are empty.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
    said: list[str | None] = []
    for piece in hop:
        if is_lost(piece):
            said.append(utf8.decode(piece.said))
        else:
            _end_character(said, utf8)
            said.append(None)
    _end_character(said, utf8)
    return said


def _end_character(said: list[str | None], utf8: codecs.IncrementalDecoder) -> None:
    """Bytes that make no character, which the loss just before has left, are its own."""
    if rest := utf8.decode(b"", final=True):
        said[-1] = f"{said[-1]}{rest}"
