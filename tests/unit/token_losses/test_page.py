"""memory.html as a file: what is packed in it, that none of it is read as markup, and that its colours can be read."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from harness.memories import bytes_of, memory, unpacked
from harness.recited import AWKWARD
from nanogpt.token_losses import scale
from nanogpt.token_losses.history import UNSEEN, TokenHistory
from nanogpt.token_losses.page import cut, make_page

EVIL = '</script><script>alert(1)</script><!-- "&amp;\r\nx\0'
TEXTS = {
    "awkward": AWKWARD,
    "markup": EVIL,
    "crlf": "a\r\nb\rc\n\r\n",
    "nul": "a\0b",
    "emoji": "🦔 x 👩‍👩‍👧 e\u0301 \ufeff",
}


class Elements(HTMLParser):
    """The elements of a page, and the text within each script and within the element with id."""

    def __init__(self, page, name):
        super().__init__()
        self.tags, self.name, self.depth, self.text = [], name, 0, ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "input", "br"):
            self.depth += bool(self.depth or dict(attrs).get("id") == self.name)

    def handle_endtag(self, _):
        self.depth -= bool(self.depth)

    def handle_data(self, data):
        self.text += data if self.depth else ""


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_page_holds_the_text_and_the_very_levels(text):
    """Reference: the text, and the history it was made of."""
    tokens = bytes_of(text)
    history, curve = memory(tokens, rows=7, last=40)
    data, its_text, pieces, levels = unpacked(make_page(history, tokens, curve, title=EVIL, is_running=True))
    assert its_text == text
    assert np.array_equal(levels, history.levels)
    assert data["steps"] == history.steps.tolist()
    assert data["losses"] == pytest.approx(curve.loss, abs=1e-5)
    assert data["known"][-1] == pytest.approx((history.learnt_at() >= 0).sum() / max(1, len(tokens) - 1), abs=1e-6)
    assert data["running"] is True
    assert sum(pieces) == len(text.encode("utf-16-le")) // 2


def test_a_character_over_several_tokens_is_one_piece():
    """Invariant: pieces are whole characters, and together the text; a last character that is cut is U+FFFD."""
    tokens = [b"a\xf0", b"\x9f\xa6", b"\x94b", b"c", b"\xe2\x82"]
    text, pieces = cut(tokens)
    assert text == "a🦔bc\ufffd"
    assert pieces.tolist() == [0, 0, 4, 1, 1]


def test_nothing_is_read_as_markup():
    """Reference: the elements of a page with harmless words; the recital reads as it was said."""
    tokens = bytes_of("a b c")
    history, curve = memory(tokens, rows=3, last=9)

    def page(words):
        said = replace(history, recital=(words, words, words))
        return make_page(said, tokens, replace(curve, outcome=words), title=words, is_running=False)

    harmless, evil = page("harmless"), page(EVIL)
    assert Elements(evil, "").tags == Elements(harmless, "").tags
    seen = EVIL.replace("\0", "␀")
    assert Elements(evil, "recital").text == Elements(harmless, "recital").text.replace("harmless", seen)
    assert "\0" not in evil


def test_the_page_needs_nothing_else():
    """Invariant: it may connect to nothing, names no address, and every place of the template was filled."""
    tokens = bytes_of("a b c")
    page = make_page(*(memory(tokens, rows=3, last=9)[0], tokens, memory(tokens)[1]), title="t", is_running=True)
    assert "default-src 'none'" in page
    assert set(re.findall(r"\w+://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "{{" not in page


def test_a_run_that_begins_has_a_page():
    """Invariant: a history without a row is shown as one row in which nothing was seen."""
    tokens = bytes_of("a b c")
    _, curve = memory(tokens)
    empty = replace(curve, steps=[], loss=[], full_pass_loss=[], wall_s=[])
    data, *_, levels = unpacked(make_page(TokenHistory.empty(3), tokens, empty, title="t", is_running=True))
    assert (data["steps"], data["losses"], data["known"]) == ([0], [None], [0])
    assert levels.tolist() == [[UNSEEN] * 3]


def test_losses_that_are_no_numbers_are_not_drawn():
    """Invariant: a curve with NaN gives a path of numbers, and null where a figure is to be shown."""
    tokens = bytes_of("a b c")
    history, curve = memory(tokens, rows=4, last=9)
    curve.loss[1] = float("nan")
    page = make_page(history, tokens, curve, title="t", is_running=False)
    assert not re.search(r'd="[^"]*(nan|inf)', page)
    assert unpacked(page)[0]["losses"][1] is None


def luminance(colour):
    """WCAG's, of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    ("paper", "ink"),
    [(scale.LIGHT_PAPER, scale.LIGHT_INK), (scale.DARK_PAPER, scale.DARK_INK), scale.LIGHT_LEARNT, scale.DARK_LEARNT],
)
def test_every_shade_can_be_read_and_told_from_the_next(paper, ink):
    """Reference: WCAG's contrast of 4.5; invariant: a scale brightens with every shade, so that a grey print has it."""
    papers = [luminance(colour) for colour in scale.ramp(*paper, scale.SHADES)]
    inks = [luminance(colour) for colour in scale.ramp(*ink, scale.SHADES)]
    for low, high in map(sorted, zip(papers, inks, strict=True)):
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert all(a < b for a, b in pairwise(papers))


def test_the_shades_of_levels():
    """Invariant: the better known, the brighter; from the darkest to the brightest, and none for what was not seen."""
    shades = scale.shade_of_level().tolist()
    assert shades[0] == scale.SHADES - 1
    assert shades[254] == 0
    assert all(a >= b for a, b in pairwise(shades[:UNSEEN]))
    assert shades[UNSEEN] == scale.NO_SHADE
