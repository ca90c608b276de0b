"""memory.html: a page on which the memorised text lights up, token by token, as the run learns it.

page = make_page(TokenHistory.load(path), token_bytes, read_curve("runs/a"), title="2,048 tokens", is_running=False)

It needs no other file and no server. While the run goes on it loads itself again, because a file may fetch nothing.
The text and all levels are packed into one string, which the page's script unpacks: the script writes the text, a
section at a time, so that a long one stays quick.
"""

import base64
import codecs
import html
import json
import re
import time
import zlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from math import isfinite, log, nan

import numpy as np
from numpy.typing import NDArray

from nanogpt.plots.run_history import Curve
from nanogpt.token_losses import scale
from nanogpt.token_losses.history import KNOWN_LEVEL, LEVEL_NATS, MOST_LEVEL, UNSEEN, TokenHistory

POINTS = 1000  # of the curve, at most: the chart is some hundred pixels wide
NUL, ITS_PICTURE = "\0", "\N{SYMBOL FOR NULL}"  # HTML cannot hold the former
LEGEND = "a text lights up"  # a letter for each shade


def make_page(history: TokenHistory, tokens: Sequence[bytes], curve: Curve, *, title: str, is_running: bool) -> str:
    """The page. tokens: the bytes of each of the N tokens of the text, which together are UTF-8."""
    assert len(tokens) == history.levels.shape[1]
    if not len(history.steps):  # a run that begins: the text in the dark
        history = history.with_row(0, np.full(len(tokens), UNSEEN, np.uint8))
    text, pieces = cut(tokens)
    data = _data(history, curve, text, is_running)
    parts = _chart(history, curve) | {
        "title": _escape(title),
        "about": _escape("training; this page follows the run" if is_running else curve.outcome),
        "state": "running" if is_running else "over",
        "styles": _styles(),
        "legend": "".join(f'<span class="k{shade}">{letter}</span>' for shade, letter in enumerate(LEGEND)),
        "early": "".join(f'<span class="m{scale.SHADES - 1 - at}">{letter}</span>' for at, letter in enumerate(LEGEND)),
        "marks": "".join(map(_mark, scale.PROBABILITIES)),
        "recital": _recital(history.recital),
        "recital_link": '<a href="#recital">Recital</a>' if history.recital else "",
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "packed": _packed(text, pieces, history.levels),
    }  # fmt: skip
    template = (files("nanogpt") / "assets" / "memory.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def cut(tokens: Sequence[bytes]) -> tuple[str, NDArray[np.uint16]]:
    """The text, and for each token (N,) how long the piece is that ends with it, in UTF-16 code units.

    A piece is the fewest tokens that are whole characters; 0 where it goes on in the next token.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts, lengths, units = [], np.zeros(len(tokens), np.uint16), 0
    for i, token in enumerate(tokens):
        texts.append(utf8.decode(token, final=i + 1 == len(tokens)))
        units += len(texts[-1].encode("utf-16-le")) // 2
        if not utf8.getstate()[0]:
            lengths[i], units = units, 0
    return "".join(texts), lengths


def _packed(text: str, pieces: NDArray[np.uint16], levels: NDArray[np.uint8]) -> str:
    """Text, pieces and levels, each row of these as its difference from the one before, which packs better."""
    rows = np.diff(levels, axis=0, prepend=np.zeros((1, levels.shape[1]), np.uint8))
    content = text.encode() + pieces.astype("<u2").tobytes() + rows.tobytes()
    return base64.b64encode(zlib.compress(content, 3)).decode()  # 6 saves 6 % and takes three times as long


def _data(history: TokenHistory, curve: Curve, text: str, is_running: bool) -> dict[str, object]:
    """What the page's script reads beside what is packed."""
    at = np.searchsorted(curve.steps, history.steps, side="right") - 1  # the row of the curve at or before each step
    losses = [curve.loss[i] if i >= 0 else nan for i in at.tolist()]
    return {
        "running": is_running,
        "written_ms": round(1000 * time.time()) if is_running else None,
        "tokens": history.levels.shape[1],
        "text_bytes": len(text.encode()),
        "steps": history.steps.tolist(),
        "losses": [round(loss, 5) if isfinite(loss) else None for loss in losses],
        "known": [round(share, 6) for share in scale.known_shares(history).tolist()],
        "level_nats": LEVEL_NATS,
        "known_level": KNOWN_LEVEL,
        "most_level": MOST_LEVEL,
        "unseen": UNSEEN,
        "shades": scale.shade_of_level().tolist(),
        "light": [scale.ramp(*ends, scale.SHADES) for ends in (scale.LIGHT_MAP, scale.LIGHT_LEARNT_MAP)],
        "dark": [scale.ramp(*ends, scale.SHADES) for ends in (scale.DARK_MAP, scale.DARK_LEARNT_MAP)],
    }


def _chart(history: TokenHistory, curve: Curve) -> dict[str, str]:
    """The loss, on a logarithmic axis, and the share of tokens known over the steps of the history."""
    first, last = int(history.steps[0]), int(history.steps[-1])
    rows = [
        (step, loss)
        for step, loss in zip(curve.steps, curve.loss, strict=True)
        if first <= step <= last and isfinite(loss) and loss > 0
    ]
    rows = rows[:: max(1, -(-len(rows) // POINTS))]
    high, low = (end([curve.target, *(loss for _, loss in rows)]) for end in (max, min))

    def across(step: int) -> float:
        return (step - first) / max(1, last - first)

    def down(loss: float) -> float:
        return log(high / loss) / (log(high / low) or 1)

    known = zip(history.steps.tolist(), scale.known_shares(history).tolist(), strict=True)
    return {
        "loss": _path((across(step), down(loss)) for step, loss in rows),
        "known": _path((across(step), 1 - share) for step, share in known),
        "target": f"{1000 * down(curve.target):.0f}",
        "high": f"{high:.3g}",
        "low": f"{low:.2g}",
    }


def _styles() -> str:
    """A class for each shade: k0 to k15 of how well a token is known, m0 to m15 of when it was learnt."""

    def rules(name: str, paper: scale.Ends, ink: scale.Ends) -> str:
        colours = zip(scale.ramp(*paper, scale.SHADES), scale.ramp(*ink, scale.SHADES), strict=True)
        return "".join(f".{name}{i} {{ background: {p}; color: {c}; }}\n" for i, (p, c) in enumerate(colours))

    light = rules("k", scale.LIGHT_PAPER, scale.LIGHT_INK) + rules("m", *scale.LIGHT_LEARNT)
    dark = rules("k", scale.DARK_PAPER, scale.DARK_INK) + rules("m", *scale.DARK_LEARNT)
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}"


def _mark(probability: float) -> str:
    """Where a probability stands in the legend, whose shades have a width each."""
    at = (float(scale.brightness(-log(probability))) * (scale.SHADES - 1) + 0.5) / scale.SHADES
    return f'<span style="left:{at:.1%}">{probability:.0%}</span>'.replace("%<", "&#8239;%<")


def _path(points: Iterable[tuple[float, float]]) -> str:
    """Of an SVG of 1000 by 1000."""
    path = "L".join(f"{1000 * x:.1f} {1000 * y:.1f}" for x, y in points)
    return path and f"M{path}"


def _recital(recital: tuple[str, str, str] | None) -> str:
    if recital is None:
        return ""
    prompt, recited, verdict = map(_escape, recital)
    return (
        '<section id="recital" aria-labelledby="recital-name"><h2 id="recital-name">The recital</h2>'
        '<p>The prompt is the text&rsquo;s own. <span class="said">What follows is the model&rsquo;s.</span></p>'
        f'<div class="words"><span class="prompt">{prompt}</span><span class="said">{recited}</span></div>'
        f'<p class="verdict">{verdict}</p></section>'
    )


def _escape(text: str) -> str:
    """text as HTML that a browser reads back as it was."""
    return html.escape(text.replace(NUL, ITS_PICTURE)).replace("\r", "&#13;")
