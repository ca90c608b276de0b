"""acceptance.html: what an acceptance found, as one page for a browser that needs no other file and no script.

    Path("acceptance.html").write_text(make_page(page), encoding="utf-8")

Every check and every rank's figure are in it. Hosts and messages come from machines, so all of it is escaped.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from math import copysign, inf, isfinite, isnan
from statistics import median

from nanogpt.acceptance.verdict import SLOW, Check, PerRank, Verdict
from nanogpt.plots.band_chart import Curve as Curve
from nanogpt.plots.band_chart import draw_charts, escape
from nanogpt.utils.format import counted, duration

NAMES = {Verdict.PASS: "passed", Verdict.FAIL: "failed", Verdict.UNKNOWN: "unknown"}
WORSE, WARM = (0.01, 0.03, 0.1, 1 - SLOW), "mpqrs"  # shares of the median, and the classes between them
BETTER, COOL = (0.01, 0.1), "mkl"
FAR, ABSENT = "rs", "o"  # classes of what is said in bold, and of no figure
READABLE_RANKS = 32  # up to which a cell has room for its figure
CHUNK_RANKS = 8  # beyond, small hosts share one place for keyboard and pointer up to this number
HINT = " Point at a host, or go to it with the arrow keys, to read each rank: its figure."


@dataclass(frozen=True)
class StageRow:
    """One stage, and what it looked at."""

    name: str
    about: str
    verdict: Verdict
    seconds: float | None
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    verdict: Verdict
    headline: str  # "FAIL: node3 (rank 3)", "PASS", "nothing failed, 2 checks unknown"
    facts: tuple[tuple[str, str], ...]  # ("when", "2026-11-30 12:03 UTC"), ("ranks", "4 on 4 nodes")
    exclude: str  # "--exclude=node3", or ""
    stages: tuple[StageRow, ...]
    hosts: tuple[str, ...]  # by rank
    per_rank: tuple[PerRank, ...]  # the heat map's rows
    curves: tuple[Curve, ...]


def make_page(page: Page) -> str:
    """The page, as HTML."""
    checks = [check for stage in page.stages for check in stage.checks]
    counts = Counter(check.verdict for check in checks)
    blamed = {rank for check in checks if check.verdict is Verdict.FAIL for rank in check.ranks}
    told = ", ".join(f"{counts[verdict]} {NAMES[verdict]}" for verdict in Verdict if counts[verdict])
    parts = {
        "class": page.verdict.lower(),
        "title": escape(page.headline),
        "verdict": _mark(page.verdict),
        "headline": escape(page.headline.removeprefix(page.verdict).removeprefix(":").strip()),
        "counts": f"{counted(len(checks), 'check')}: {told}" if checks else "nothing was looked at",
        "facts": "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(fact)}</dd></div>" for what, fact in page.facts),
        "exclude": escape(page.exclude),
        "stages": "".join(_stage(stage, page.hosts) for stage in page.stages),
        "ranks": "".join(_heat_row(row, f"row{i}", page.hosts, blamed) for i, row in enumerate(page.per_rank)),
        "hint": HINT if len(page.hosts) > READABLE_RANKS else "",
        "curves": draw_charts(page.curves),
    }
    template = (files("nanogpt") / "assets" / "acceptance.html").read_text(encoding="utf-8")
    for part in ("exclude", "stages", "ranks", "curves"):  # what has nothing to show goes, with its heading
        if not parts[part]:
            template = re.sub(rf'<section id="{part}".*?</section><!--{part}-->', "", template, flags=re.DOTALL)
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _mark(verdict: Verdict) -> str:
    return f'<span class="v {verdict.lower()}"><svg aria-hidden="true"><use href="#{verdict}"/></svg>{verdict}</span>'


def _ratio(part: float, whole: float) -> float:
    """part / whole, where nothing of nothing is nothing."""
    return part / whole if whole else copysign(inf, part) if part else 0.0


# The stages.


def _stage(stage: StageRow, hosts: Sequence[str]) -> str:
    counts = Counter(check.verdict for check in stage.checks)
    short = ", ".join(f"{counts[v]} {NAMES[v]}" for v in (Verdict.FAIL, Verdict.UNKNOWN) if counts[v])
    cells = {
        "about": escape(stage.about),
        "of": f"{short} of {len(stage.checks)}" if short else counted(len(stage.checks), "check"),
        "time": "not timed" if stage.seconds is None else duration(stage.seconds),
    }
    spans = "".join(f' <span class="{name}">{text}</span>' for name, text in cells.items())
    columns = "".join(f'<th scope="col">{name}</th>' for name in ("verdict", "check", "found", "expected", "ranks"))
    rows = "".join(_check(check, hosts) for check in stage.checks)
    table = f"<table><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>"
    return (
        f'<details class="stage"{" open" * (stage.verdict is not Verdict.PASS)}>'
        f"<summary>{_mark(stage.verdict)} <b>{escape(stage.name)}</b>{spans}</summary>"
        f"{table if rows else '<p>nothing was looked at</p>'}</details>\n"
    )


def _check(check: Check, hosts: Sequence[str]) -> str:
    cells = {"check": check.name, "found": check.found, "expected": check.expected}
    texts = "".join(f'<td class="{name}">{escape(text)}</td>' for name, text in cells.items())
    if ranks := ", ".join(_places(check.ranks, hosts)):
        ranks = f"<div>{ranks}</div>"  # a box that scrolls where they are many
    return (
        f'<tr class="{check.verdict.lower()}"><td>{_mark(check.verdict)}</td>{texts}<td class="ranks">{ranks}</td></tr>'
    )


def _places(ranks: Iterable[int], hosts: Sequence[str]) -> Iterator[str]:
    """Ranks by their hosts, as HTML, 'node1 (ranks 4&ndash;7)'."""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(set(ranks)):
        by_host.setdefault(hosts[rank] if rank < len(hosts) else "?", []).append(rank)
    for host, its in by_host.items():
        runs = [[rank for _, rank in run] for _, run in groupby(enumerate(its), lambda pair: pair[1] - pair[0])]
        told = ", ".join(f"{run[0]}&ndash;{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        yield f"<span>{escape(host)} (rank{'s' * (len(its) > 1)} {told})</span>"


# The heat map. Up to READABLE_RANKS every figure is seen. Beyond, a host is a strip of colours and a radio button: the
# arrow keys go from host to host without a script, and a touch is enough to read its figures.


@dataclass(frozen=True)
class _Cell:
    rank: str  # with a '!' where a check that failed names it
    figure: str
    level: str

    def colour(self) -> str:
        return f'"{self.level} x"' if self.rank.endswith("!") else self.level


def _heat_row(row: PerRank, name: str, hosts: Sequence[str], blamed: set[int]) -> str:
    figures = [value for value in row.values if value is not None and isfinite(value)]
    middle = median(figures) if figures else 0.0
    about = f"median {_figure(middle)}, {_figure(min(figures))} to {_figure(max(figures))}" if figures else "no figures"
    by_host: dict[str, list[_Cell]] = {}
    for rank, host in enumerate(hosts):
        value = row.values[rank] if rank < len(row.values) else None
        level = _level(value, middle, row.more_is_better)
        by_host.setdefault(host, []).append(_Cell(f"{rank}{'!' * (rank in blamed)}", _figure(value), level))
    readable = len(hosts) <= READABLE_RANKS
    if readable:
        groups = [_readable(host, cells) for host, cells in by_host.items()]
    else:
        groups = [_dense({host: by_host[host] for host in chunk}, name) for chunk in _chunks(by_host)]
    about += f"; {'more' if row.more_is_better else 'less'} is better"
    kind = "row" if readable else "row dense"
    return f'<div class="{kind}"><h3>{escape(row.name)}</h3><p>{about}</p><ul>{"".join(groups)}</ul></div>\n'


def _readable(host: str, cells: Sequence[_Cell]) -> str:
    """A host whose cells show their figures."""
    inner = "".join(f"<li class={cell.colour()}><small>{cell.rank}</small> {cell.figure}</li>" for cell in cells)
    return f"<li>{escape(host)}<ol>{inner}</ol></li>"


def _dense(hosts: dict[str, list[_Cell]], row: str) -> str:
    """Hosts as a strip of colours, and their figures for who points at it or goes there."""
    strips = ["".join(f"<i class={cell.colour()}></i>" for cell in cells) for cells in hosts.values()]
    told = []
    for host, cells in hosts.items():
        texts = [(f"{cell.rank}: {cell.figure}", cell.level in FAR) for cell in cells]
        told.append(f"{escape(host)} {'; '.join(f'<b>{text}</b>' if far else text for text, far in texts)}")
    name = escape(next(iter(hosts))) + " …" * (len(hosts) > 1)
    strip = ("" if len(strips) == sum(map(len, hosts.values())) else "</s><s>").join(strips)
    return (
        f"<li><label><input type=radio name={row}><bdi aria-hidden=true>{name}</bdi><s>{strip}</s>"
        f"<span>{'; '.join(told)}</span></label></li>"
    )


def _chunks(by_host: dict[str, list[_Cell]]) -> list[list[str]]:
    """Hosts, neighbours together while they have CHUNK_RANKS or fewer."""
    chunks: list[list[str]] = [[]]
    for host, cells in by_host.items():
        if chunks[-1] and len(cells) + sum(len(by_host[other]) for other in chunks[-1]) > CHUNK_RANKS:
            chunks.append([])
        chunks[-1].append(host)
    return chunks


def _level(value: float | None, middle: float, more_is_better: bool) -> str:
    """The class of a cell's colour."""
    if value is None:
        return ABSENT
    if isnan(value):
        return WARM[-1]
    worse = _ratio(middle - value if more_is_better else value - middle, abs(middle))
    return WARM[bisect_right(WORSE, worse)] if worse >= 0 else COOL[bisect_right(BETTER, -worse)]


def _figure(value: float | None) -> str:
    if value is None:
        return "&ndash;"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
