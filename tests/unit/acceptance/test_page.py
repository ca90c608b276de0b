"""acceptance.html as a parser that is not ours reads it: what came in is there, and nothing of it became markup."""

import json
import re
from html.parser import HTMLParser
from math import inf, nan

import pytest

from nanogpt.acceptance.page import Page, StageRow, make_page
from nanogpt.acceptance.verdict import Check, PerRank, Verdict
from nanogpt.plots.band_chart import MARKS, Curve, describe

PASS, FAIL, UNKNOWN = Verdict
NASTY = "<b>&amp;</b> \"quoted\" 'too' </script> <!-- {{stages}} \0 \ud800 \n日本"
SHOWN = NASTY.replace("\0", "␀").replace("\ud800", "?")
VOID = {"meta", "input"}
OPTIONAL_END = {"td", "th", "tr"}


def check(name="name", verdict=PASS, found="found", expected="expected", ranks=()):
    """A check."""
    return Check(name=name, verdict=verdict, found=found, expected=expected, ranks=tuple(ranks))


def page(**changes):
    """A page with little in it."""
    parts = {"verdict": PASS, "headline": "PASS", "facts": (("when", "today"),), "exclude": "", "stages": ()}
    return Page(**(parts | {"hosts": ("node0",), "per_rank": (), "curves": ()} | changes))


def heat(values, hosts, checks=(), more_is_better=True):
    """A page with one row in its heat map."""
    row = PerRank(name="row, GB/s", values=tuple(values), more_is_better=more_is_better)
    return Reader(make_page(page(hosts=tuple(hosts), per_rank=(row,), stages=(stage(*checks),))))


def stage(*checks, **changes):
    """A stage."""
    parts = {"name": "stage", "about": "about", "verdict": PASS, "seconds": 1.0, "checks": checks}
    return StageRow(**(parts | changes))


class Reader(HTMLParser):
    """The page's elements: (tag, attributes, text in it) in the order in which they begin."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open = [], []
        page.encode()  # else it could not be written
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        while tag in OPTIONAL_END and self.open[-1][0] in OPTIONAL_END - ({"tr"} if tag != "tr" else set()):
            self.open.pop()  # td, th and tr end where the next of their row or table begins
        element = [tag, {name: value or "" for name, value in attributes}, ""]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        while self.open[-1][0] in OPTIONAL_END and self.open[-1][0] != tag:
            self.open.pop()
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def texts(self, tag, **attributes):
        """The text of each element of that kind."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [text for name, has, text in self.elements if name == tag and wanted.items() <= has.items()]

    def after(self, tag):
        """(tag, attributes) from the first element of that kind on."""
        names = [name for name, _, _ in self.elements]
        return [(name, has) for name, has, _ in self.elements[names.index(tag) :]]

    def cells(self):
        """The heat map's: (rank and figure, or None where there is no room; class)."""
        inside = next(i for i, element in enumerate(self.elements) if element[1].get("class", "").startswith("row"))
        tags = ("i",) if "dense" in self.elements[inside][1]["class"] else ("li",)
        found = [(text, has["class"]) for tag, has, text in self.elements[inside:] if tag in tags and "class" in has]
        return [(tuple(text.split()) or None, kind) for text, kind in found]


def test_nothing_that_came_in_becomes_markup():
    """Invariant: an awkward text is itself in every place that shows it, and adds no element."""

    def everywhere(text):
        return make_page(
            page(
                verdict=FAIL,
                headline=f"FAIL: {text}",
                facts=((text, text),),
                exclude=f"--exclude={text}",
                hosts=(text, *(["other"] * 40)),
                per_rank=(PerRank(name=text, values=(1.0,) * 41),),
                curves=(Curve(text, (1.0,), (1.0,), (0.1,)),),
                stages=(stage(check(text, FAIL, text, text, [0]), name=text, about=text, verdict=FAIL),),
            )
        )

    nasty, plain = Reader(everywhere(NASTY)), Reader(everywhere("plain"))
    assert [element[:2] for element in nasty.elements] == [element[:2] for element in plain.elements]
    assert sum(SHOWN in text for _, _, text in nasty.elements) == sum("plain" in text for _, _, text in plain.elements)
    assert nasty.texts("dd") == [SHOWN]
    assert nasty.texts("td", class_="ranks") == [f"{SHOWN} (rank 0)"]
    assert nasty.texts("code")[0] == f"--exclude={SHOWN}"


def test_every_check_is_there():
    """Reference: the checks that came in, by stage; stages that do not pass are open."""
    stages = [
        stage(*(check(f"{v} {i}", v, f"found {i}", f"held to {i}") for i in range(3)), name=f"stage {v}", verdict=v)
        for v in Verdict
    ]
    reader = Reader(make_page(page(stages=tuple(stages))))
    rows = [row for row in reader.texts("tr") if not row.startswith("verdictcheck")]
    assert rows == [f"{c.verdict}{c.name}{c.found}{c.expected}" for each in stages for c in each.checks]
    opened = ["open" in has for tag, has, _ in reader.elements if tag == "details"]
    assert opened == [v is not PASS for v in Verdict]
    assert reader.texts("p", class_="counts") == ["9 checks: 3 passed, 3 failed, 3 unknown"]


def test_ranks_are_told_by_their_hosts():
    """Reference: written out; ranks of which no host is known are there too."""
    hosts = ["a", "b", "a", "b", "a", "b"]
    reader = Reader(make_page(page(hosts=tuple(hosts), stages=(stage(check(ranks=[9, 5, 0, 2, 4, 1, 1])),))))
    assert reader.texts("td", class_="ranks") == ["a (ranks 0, 2, 4), b (ranks 1, 5), ? (rank 9)"]
    reader = Reader(make_page(page(hosts=("a",) * 4 + ("b",), stages=(stage(check(ranks=[1, 2, 3, 4])),))))
    assert reader.texts("td", class_="ranks") == ["a (ranks 1\N{EN DASH}3), b (rank 4)"]


def test_what_there_is_nothing_of_has_no_heading():
    """Invariant: a page of nothing has none of the four parts, no script acts on what is not there."""
    empty = Reader(make_page(page()))
    assert [has["id"] for tag, has, _ in empty.elements if tag == "section"] == []
    assert empty.texts("p", class_="counts") == ["nothing was looked at"]
    full = Reader(make_page(page(exclude="--exclude=node0", stages=(stage(seconds=None),))))
    assert [has["id"] for tag, has, _ in full.elements if tag == "section"] == ["exclude", "stages"]
    assert full.texts("span", class_="time") == ["not timed"]


def test_it_needs_no_other_file():
    """Invariant: no element loads or leads anywhere, and the browser is told to load nothing."""
    text = make_page(page(exclude="x", stages=(stage(check()),), per_rank=(PerRank(name="r", values=(1.0,)),)))
    reader = Reader(text)
    leads = [has for _, has, _ in reader.elements for name in ("src", "href", "data", "action") if name in has]
    assert {has["href"] for has in leads} == {"#PASS"}
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|@import", text)


@pytest.mark.parametrize(
    ("value", "more_is_better", "kind"),
    [
        (100.0, True, "m"), (99.5, True, "m"), (98.0, True, "p"), (95.0, True, "q"), (80.0, True, "r"),
        (60.0, True, "s"),
        (105.0, True, "k"), (150.0, True, "l"), (100.0, False, "m"), (102.0, False, "p"), (150.0, False, "s"),
        (60.0, False, "l"), (None, True, "o"), (nan, True, "s"), (-inf, True, "s"), (inf, False, "s"),
    ],
)  # fmt: skip
def test_a_cell_is_the_warmer_the_worse(value, more_is_better, kind):
    """Reference: written out: shares of the median, 100, in letters from l, better, over m, equal, to s, far worse."""
    reader = heat([100.0, 100.0, 100.0, value], ["a", "b", "c", "d"], more_is_better=more_is_better)
    assert [k for _, k in reader.cells()] == ["m", "m", "m", kind]
    assert reader.cells()[3][0] == ("3", "\N{EN DASH}" if value is None else f"{value:g}")


def test_equal_figures_are_neutral_and_a_median_of_nothing_divides_nothing():
    """Invariant: what equals the median is neutral, 0 too; any other figure is then as far as can be."""
    assert [kind for _, kind in heat([7.0] * 3, "abc").cells()] == ["m"] * 3
    assert [kind for _, kind in heat([0.0, 0.0, 3.0], "abc", more_is_better=False).cells()] == ["m", "m", "s"]
    assert [kind for _, kind in heat([0.0, 0.0, 3.0], "abc").cells()] == ["m", "m", "l"]
    assert [kind for _, kind in heat([None, None], "ab").cells()] == ["o", "o"]
    assert [kind for _, kind in heat([1.0], "ab").cells()] == ["m", "o"], "a rank without a figure has a cell"


@pytest.mark.parametrize(("hosts", "per_host"), [(1, 1), (4, 8), (5, 7), (64, 8), (256, 2), (512, 1), (2, 256)])
def test_every_rank_is_there(hosts, per_host):
    """Reference: the figures that came in, under their hosts, and the ranks that failed checks name, outlined."""
    names = [f"node{rank // per_host}x" for rank in range(hosts * per_host)]
    blamed = {0, len(names) - 1}
    reader = heat([1000.5 + rank for rank in range(len(names))], names, [check(verdict=FAIL, ranks=blamed)])
    cells = reader.cells()
    assert {i for i, (_, kind) in enumerate(cells) if kind.endswith(" x")} == blamed
    told = " ".join(text or "" for text in reader.texts("ul")[-1:])
    expected = [f"{rank}{'!' * (rank in blamed)}" for rank in range(len(names))]
    if len(names) <= 32:
        assert [cell[0] for cell, _ in cells] == expected
    else:
        assert [f"{rank}:" for rank in expected] == re.findall(r"\d+!?:", told)
    for rank in range(len(names)):
        assert f"{1000.5 + rank:,.0f}" in told
    for host in set(names):
        assert host in told
    labels = len(reader.texts("label"))
    assert labels == 0 if len(names) <= 32 else labels <= 64, "places to go to with the keyboard"


def test_512_ranks_are_a_small_page():
    """Invariant: under 300 kB with eight figures a rank, a host a rank, and ten curves of 30 steps."""
    rows = tuple(PerRank(name=f"row {i}", values=tuple(300 + r / 9 + i for r in range(512))) for i in range(8))
    golden = tuple(11 - step / 4 for step in range(30))
    curve = Curve("bf16, ddp", tuple(loss * 1.00123 for loss in golden), golden, (0.01,) * 30)
    hosts = tuple(f"node{rank}" for rank in range(512))
    text = make_page(page(hosts=hosts, per_rank=rows, curves=(curve,) * 10, stages=(stage(check(), check()),)))
    assert len(text.encode()) < 300_000


HALF, TWICE = "5.0e-02 off, 1.0e-01 allowed", "2.0e-01 off, 1.0e-01 allowed"
GOLDEN, BAND = (10.0, 8.0, 5.0, 4.0), (0.1, 0.1, 0.1, 0.1)


@pytest.mark.parametrize("verdict", ["fail", "unknown"])
def test_a_curve_that_fails_by_something_else_is_not_green(verdict):
    """Invariant: where gradient norms or replicas decide, the chart has that verdict and says why."""
    why = "the gradient norm of step 5 is <far> off"
    curve = Curve("fp32, ddp", GOLDEN, GOLDEN, BAND, verdict=verdict, why=why)
    reader = Reader(make_page(page(curves=(curve,))))
    assert next(has for tag, has, _ in reader.elements if tag == "figure")["class"] == verdict
    (told,) = (has["aria-label"] for tag, has, _ in reader.elements if has.get("role") == "img")
    assert told == f"{why}; each loss equal to the golden curve at all 4 steps"


@pytest.mark.parametrize(
    ("measured", "kind", "told"),
    [
        (GOLDEN, "pass", "equal to the golden curve at all 4 steps"),
        ((10.0, 8.4, 5.0, 4.0), "pass", f"in its band at all 4 steps, nearest to its edge at step 2 ({HALF})"),
        ((10.0, 8.0, 6.0, 4.0), "fail", f"leaves its band at step 3 ({TWICE}), outside at 1 of 4 steps"),
        (
            (10.0, 8.0, 4.0),
            "fail",
            f"leaves its band at step 3 ({TWICE}), outside at 1 of 4 steps; no loss at 1 of 4 steps, first at step 4",
        ),
        ((10.0, None, nan, inf), "unknown", "no loss at 3 of 4 steps, first at step 2"),
        ((), "unknown", "no loss at 4 of 4 steps, first at step 1"),
    ],
)  # fmt: skip
def test_a_curve_says_where_it_leaves_its_band(measured, kind, told):
    """Reference: written out; no loss is never in the band."""
    curve = Curve("fp32, ddp", measured, GOLDEN, BAND)
    assert describe(curve.steps()) == (kind, told)
    reader = Reader(make_page(page(curves=(curve,))))
    assert [has["aria-label"] for tag, has, _ in reader.elements if has.get("role") == "img"] == [told]
    figure = next(has for tag, has, _ in reader.elements if tag == "figure")
    assert figure["class"] == kind
    steps = curve.steps()
    rows = [has["class"] for tag, has, _ in reader.elements if tag == "tr" and "class" in has]
    assert rows == [step.kind for step in steps], "the table of its figures"
    drawn = "".join(has["d"] for tag, has in reader.after("figure") if tag == "path" and has.get("class") in MARKS)
    assert drawn.count("M") == len(steps), "a mark a step"
    assert len(reader.texts("text", class_="leaves") + reader.texts("text", class_="leaves end")) == (kind == "fail")


def test_charts_share_their_axes_whatever_was_measured():
    """Invariant: every number in a path is finite and in the picture; a golden loss of 0, a band of 0 too."""
    golden = (10.0, 0.0, 5.0)
    curves = [
        Curve("a", (1e30, 1e-30, -1e30), golden, (1e-12, 0.0, 1e3)),
        Curve("b", (10.0, 0.0, 5.0 + 1e-14), golden, (0.0, 0.0, 0.0)),
        Curve("c", (1.0,), (1.0,), (0.0,)),
        Curve("none", (), (), ()),
    ]
    reader = Reader(make_page(page(curves=tuple(curves))))
    assert len(reader.texts("figure")) == 3
    axes = {json.dumps([t for t in figure.split() if t.startswith("10")]) for figure in reader.texts("svg")[-3:]}
    assert len(axes) == 1
    for tag, has in reader.after("figure"):
        if tag == "path" and has.get("class") in ("band", "line", "golden", "loss"):
            assert re.fullmatch(r"[MLVHhz\d. -]*", has["d"]), has["d"]
            for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", has["d"]):
                assert 0 <= float(x) <= 360
                assert 0 <= float(y) <= 210
