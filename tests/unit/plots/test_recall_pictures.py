"""The text as a heat map, as a picture and as a page: both show exactly what the arrays of RecitedText hold."""

import json
from itertools import pairwise

import pytest
import torch
from matplotlib.image import imread

from harness.recited import AWKWARD, PROMPT, TITLE, Page, long_text, pieces_of, recited
from harness.runs import report
from nanogpt.data.corpus import read_corpus
from nanogpt.data.tokenizer import decode, encode
from nanogpt.evaluate.recall import RecitedText
from nanogpt.plots.loss_plot import save
from nanogpt.plots.recall_html import make_page
from nanogpt.plots.recall_layout import (
    MAX_ROWS,
    NEWLINE,
    SAID_SIZE,
    SHEET_WIDTH,
    Gap,
    columns_of,
    lay_out,
    select,
    set_lines,
)
from nanogpt.plots.recall_map import Mark, cut, headline, marks, overview, tally
from nanogpt.plots.recall_png import CHARACTER, MARGIN, draw_recall, save_recall
from nanogpt.storage.report import Report
from nanogpt.utils.format import percent

WIDTH = 2 * MARGIN + SHEET_WIDTH * CHARACTER  # of recall.png, pixels


def test_a_mark_says_what_became_of_a_token():
    """Reference: written out; what was recited is recited even where the true text would not have led there."""
    ids, said = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([-1, 6, 1, 1, 9])
    predicted = torch.tensor([False, True, True, False, False])
    mark = marks(RecitedText(ids, predicted, said, said == ids, torch.ones(5)))
    assert [Mark(m).name for m in mark.tolist()] == ["GIVEN", "RECITED", "PREDICTED", "WRONG", "RECITED"]
    assert tally(mark) == {
        Mark.GIVEN: "given as the first prompt: 1",
        Mark.RECITED: "recited: 2 (50.0%)",
        Mark.PREDICTED: "predicted, not recited: 1 (25.0%)",
        Mark.WRONG: "wrong: 1 (25.0%)",
    }


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [(0, 9, "0.0%"), (1, 9999, "<0.1%"), (9998, 9999, ">99.9%"), (9, 9, "100.0%"), (1, 3, "33.3%")],
)
def test_a_share_is_not_rounded_to_all_or_nothing(part, whole, said):
    """Reference: written out."""
    assert percent(part / whole) == said


def test_pieces_are_whole_characters_and_all_of_the_text():
    """Invariant: together they are the text and its tokens, each as bad as its worst token; the last may be cut."""
    text = recited(AWKWARD)
    text = RecitedText(*(x[:-1] for x in (text.ids, text.predicted, text.said, text.recited, text.margin)))
    pieces, mark = cut(text), marks(text)
    assert "".join(piece.text for piece in pieces) == decode(text.ids.tolist())
    assert "".join(piece.text for piece in pieces[:-1]) == AWKWARD[: AWKWARD.rindex(" 😀")]
    assert pieces[-1].text.endswith("\N{REPLACEMENT CHARACTER}")
    assert any(piece.tokens > 1 for piece in pieces)
    assert [piece.token for piece in pieces[1:]] == [piece.token + piece.tokens for piece in pieces[:-1]]
    for piece in pieces:
        assert piece.mark == mark[piece.token : piece.token + piece.tokens].max()
        assert piece.hop == piece.token // PROMPT - 1
        assert bool(piece.said) == (piece.mark > Mark.RECITED)


def test_the_overview_hides_no_loss():
    """Invariant: a column's heights sum to 1, and one token lost of 1,000 is seen; reference: a token a column."""
    mark = torch.full((100_000,), int(Mark.RECITED), dtype=torch.uint8)
    mark[54_321] = Mark.WRONG
    heights = overview(mark, 100)
    assert torch.allclose(heights.sum(dim=1), torch.ones(100, dtype=torch.float64))
    assert heights[:, Mark.WRONG].nonzero().tolist() == [[54]]
    assert heights[54, Mark.WRONG] > 0.05
    few = marks(recited(AWKWARD))
    assert torch.equal(overview(few, 1000), torch.nn.functional.one_hot(few.long(), 4).double())


@pytest.mark.parametrize("text", [AWKWARD, long_text(60)], ids=["awkward", "lines"])
def test_the_page_holds_the_text_and_what_became_of_it(text):
    """Reference: the text, character by character, and the arrays, token by token; equal neighbours are one element."""
    recitation = recited(text)
    page = Page(make_page(recitation, TITLE))
    assert page.open == []
    assert "".join(content for _, content, _ in page.runs) == text.replace("\0", "␀")
    for (a, content, block), (b, _, other) in pairwise(page.runs):
        assert a != b or (block != other and content.endswith("\n"))
    shown = [name for name, content, _ in page.runs for _ in content]
    assert shown == ["grpw"[piece.mark] for piece in cut(recitation) for _ in piece.text]
    data, ids, said = json.loads(page.json), recitation.ids.tolist(), recitation.said.tolist()
    assert data["tokens"] == len(ids)
    lost = []
    for token, count, piece, words in (piece for hop in pieces_of(data, text) for piece in hop):
        assert piece.replace("␀", "\0") == decode(ids[token : token + count])
        if words is not None:
            lost += range(token, token + count)
            if "\N{REPLACEMENT CHARACTER}" not in decode(said[token : token + count]):
                assert words == decode(said[token : token + count])
    pieces = [piece for piece in cut(recitation) if piece.mark > Mark.RECITED]
    assert lost == [token for piece in pieces for token in range(piece.token, piece.token + piece.tokens)]


def test_the_page_needs_nothing_else():
    """Invariant: no element refers to anything, a policy forbids it, and the same arrays give the same bytes."""
    page = make_page(recited(AWKWARD), TITLE)
    assert page == make_page(recited(AWKWARD), TITLE)
    parsed = Page(page)
    assert {name for _, name, _ in parsed.attributes}.isdisjoint({"src", "href", "srcset", "action", "poster", "style"})
    frame = page[: page.index("<main")] + page[page.index("<script>") :]
    assert not any(word in frame for word in ("://", "url(", "@import", "fetch(", "XMLHttpRequest"))
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'") in (
        parsed.attributes
    )
    assert "<h1>100 tokens of &lt;it&gt; &amp; {{text}}; target reached</h1>" in page


def test_a_character_said_in_parts_is_put_together():
    """Reference: written out; its bytes are in two tokens, and the first of them says nothing by itself."""
    ids = torch.tensor(encode(" a b c d e f"))
    said = torch.tensor([-1, -1, *encode("👋"), *encode(" e f")])
    text = RecitedText(ids, said == ids, said, said == ids, torch.ones(6))
    assert [told for *_, told in json.loads(Page(make_page(text, TITLE)).json)["hops"]] == [["", "👋"]]


def test_a_long_page_stays_small():
    """Invariant: where all of a text came back, the page is the text, its frame and one element a block."""
    text = long_text()
    page = make_page(recited(text, lose=0), TITLE)
    assert len(Page(page).runs) < len(encode(text)) / 200
    assert len(page) < len(text) + 45_000


def test_lines_hold_the_text_and_what_was_said():
    """Invariant: cells in order are the text, side by side and within the width; beneath losses stand words, apart."""
    for text in (AWKWARD, long_text(20), "word" * 100 + "\n\n" + "日本" * 40):
        pieces = cut(recited(text, lose=0.8))
        lines = set_lines(pieces, width=40)
        told = [cell.piece for line in lines for cell in line.cells]
        assert [piece for piece, after in pairwise([*told, None]) if piece is not after] == pieces
        drawn = "".join(cell.text for line in lines for cell in line.cells if cell.text != NEWLINE)
        hidden = str.maketrans({"\n": "", "\t": "⇥", "\r": "�", "\0": "�", "\7": "�"})
        assert drawn == text.translate(hidden)
        for line in lines:
            assert all(a.column + a.width == b.column for a, b in pairwise(line.cells))
            assert line.end <= 41  # a newline may hang over
            ends = [said.column + SAID_SIZE * columns_of(said.text) for said in line.said]
            assert all(end <= after.column for end, after in zip(ends, line.said[1:], strict=False))
            assert all(said.column >= 0 for said in line.said)
            assert not ends or ends[-1] <= 40
        begun = {}
        for number, line in enumerate(lines):
            for cell in line.cells:
                begun.setdefault(cell.piece.token, number)
        lost = {begun[piece.token] for piece in pieces if piece.mark > Mark.RECITED}
        assert lost == {number for number, line in enumerate(lines) if line.said}


def test_a_short_text_is_shown_whole():
    """Reference: one loss in a known place, in the words that were said."""
    text = recited(long_text(30), lose=0)
    text.said[20:23] = torch.tensor(encode(" quite wrong\n")[:3])
    text = RecitedText(text.ids, text.predicted, text.said, text.said == text.ids, text.margin)
    sheet = lay_out(cut(text))
    lines = [line for column in sheet.columns for line in column]
    assert len(lines) == 30
    (line,) = [line for line in lines if line.said]
    assert [said.text for said in line.said] == [" quite wrong" + NEWLINE]
    (cell,) = [cell for cell in line.cells if cell.piece.token == 20]
    assert line.said[0].column == cell.column


@pytest.mark.parametrize("lose", [0.0, 0.001, 0.05, 1.0])
def test_a_long_text_is_shown_in_parts(lose):
    """Invariant: no column is higher than allowed; lines and gaps are all tokens once; losses are from everywhere."""
    text = recited(long_text(), lose=lose)
    pieces = cut(text)
    sheet = lay_out(pieces)
    assert all(sum(item.rows for item in column) <= MAX_ROWS + 2 for column in sheet.columns)
    items = [item for column in sheet.columns for item in column]
    token = 0
    for item in items:
        if isinstance(item, Gap):
            assert item.first == token
            token = item.end
        else:
            token = item.cells[-1].piece.token + item.cells[-1].piece.tokens
    assert token == len(text.ids)
    first = next(i for i, item in enumerate(items) if isinstance(item, Gap))
    assert first >= len(sheet.columns) * MAX_ROWS / 7  # the beginning: a third of the rows, and at most two a line
    shown = [item.cells[0].piece.token for item in items if not isinstance(item, Gap) and item.said]
    if lose >= 0.05:
        assert max(b - a for a, b in pairwise([*shown, len(text.ids)])) < len(text.ids) / 5
    if lose == 0.001:
        assert len(shown) == sum(line.said != [] for line in set_lines(pieces, sheet.width))
    assert select(set_lines(pieces, 60)[:50], 1000) == set_lines(pieces, 60)[:50]


def test_the_picture_is_the_same_each_time(tmp_path):
    """Invariant: the same arrays give the same bytes, for any text; a title's $ is a $."""
    for name in ("a.png", "b.png"):
        save(draw_recall(recited(AWKWARD), ["$ and $", "two"]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert imread(tmp_path / "a.png").shape[1] == WIDTH


def test_a_picture_that_cannot_be_drawn_costs_one_line(tmp_path):
    """Invariant: no exception, one warning, no file."""
    heard = []
    save_recall(tmp_path / "missing", recited(AWKWARD), TITLE, heard.append)
    assert [line[:46] for line in heard] == ["warning: recall.png could not be drawn ([Errno"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_its_text_as_a_picture_and_gives_it_as_a_page(finished, tmp_path, forked):
    """Reference: the memorised text, and the share recited that the run's report states."""
    out_dir, _ = finished
    told = report(out_dir)
    assert imread(out_dir / "recall.png").shape[1] == WIDTH
    score = (tmp_path, "nanogpt", "score", out_dir)
    done = forked(*score, f"--html={tmp_path / 'recall.html'}")
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "recall.html").read_text(encoding="utf-8")
    page = Page(html)
    ids = encode(read_corpus("builtin").text)[:256]
    assert "".join(content for _, content, _ in page.runs) == decode(ids)
    share = told["recall"]["hop_recitation"]["recited"]
    assert f"recited</span> {share * 240:,.0f} ({percent(round(share * 240) / 240)})" in html
    assert headline("builtin", Report.read(out_dir / "report.json", of="a run"))[0] in html
    done = forked(*score, "--html=no/such/place.html")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --html=no/such/place.html cannot be written: no/such is no directory\n"
    for name, why in (("model.safetensors", "must end in .html"), ("memory.html", "is a file of the run itself")):
        before = (out_dir / name).read_bytes()
        done = forked(*score, f"--html={out_dir / name}")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"--html={out_dir / name} {why}" in done.stderr
        assert (out_dir / name).read_bytes() == before
