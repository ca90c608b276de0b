"""A loss curve beside the golden one that it must follow, as SVG in a page: is it in its band, and where does it leave?

    Curve("fp32, ddp", measured, golden, band).outside()      # the steps at which it is not in its band
    draw_charts([Curve("fp32, ddp", measured, golden, band)])

Losses that agree to six digits lie on each other, so what is drawn large is how far they are from each other.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite, log10

LEFT, WIDTH = 34, 320  # of both plots, in units of which a chart has 360
TOP, BOTTOM, EQUAL = 20, 126, 139  # of the deviations; below them what is equal, for which a logarithm has no place
LOSS_TOP, LOSS_BOTTOM = 158, 194
DECADES = (-9, 1)  # beyond which no deviation needs to be told from another
MARKS = {"in": "h0", "out": "m-4 0l4-4 4 4-4 4z", "lost": "m-3-3l6 6m0-6l-6 6"}  # a dot, a diamond, a cross
COLUMNS = ("step", "loss", "golden", "off by", "allowed")


@dataclass(frozen=True)
class Step:
    """One step of a curve."""

    number: int  # from 1
    loss: float | None  # nats/token
    golden: float
    off: float | None  # |loss / golden - 1|; None where there is no loss, or none that is finite
    allowed: float

    @property
    def kind(self) -> str:
        """'in' the band, 'out' of it, or 'lost'."""
        return "lost" if self.off is None else "out" if self.off > self.allowed else "in"

    def __str__(self) -> str:
        return "no loss" if self.off is None else f"{self.off:.1e} off, {self.allowed:.1e} allowed"


@dataclass(frozen=True)
class Curve:
    """One run of a fixed job, beside its golden curve."""

    name: str  # "fp32, sharded"
    measured: tuple[float | None, ...]  # loss after each step, nats/token; None, or too short: there is none
    golden: tuple[float, ...]
    band: tuple[float, ...]  # allowed deviation at each step, as a share of the golden loss
    verdict: str = ""  # 'fail' or 'unknown' where something else than these losses decides
    why: str = ""  # and what it is

    def steps(self) -> list[Step]:
        """One a step of the golden curve."""
        steps = []
        for i, (golden, allowed) in enumerate(zip(self.golden, self.band, strict=True)):
            loss = self.measured[i] if i < len(self.measured) else None
            off = None
            if loss is not None and isfinite(loss):
                off = abs(loss - golden) / abs(golden) if golden else inf if loss else 0.0
            steps.append(Step(i + 1, loss, golden, off, allowed))
        return steps


def escape(text: str) -> str:
    """text as HTML, in an element or a quoted attribute, without what UTF-8 or HTML cannot hold."""
    return html.escape(text.replace("\0", "\N{SYMBOL FOR NULL}").encode(errors="replace").decode())


def draw_charts(curves: Sequence[Curve]) -> str:
    """HTML: a <figure> a curve that has steps, their axes alike."""
    all_steps = [(curve, steps) for curve in curves if (steps := curve.steps())]
    shares = [share for _, steps in all_steps for step in steps for share in (step.off, step.allowed)]
    told = [log10(share) for share in shares if share and isfinite(share)] or [0.0]
    low = min(max(floor(min(told)), DECADES[0]), DECADES[1] - 1)
    high = max(min(ceil(max(told)), DECADES[1]), low + 1)
    return "".join(_chart(curve, steps, low, high) for curve, steps in all_steps)


def describe(steps: Sequence[Step]) -> tuple[str, str]:
    """('fail', 'unknown' or 'pass', what an engineer wants to know of a curve)."""
    out, lost = ([step for step in steps if step.kind == kind] for kind in ("out", "lost"))
    without = f"no loss at {len(lost)} of {len(steps)} steps, first at step {lost[0].number}" if lost else ""
    if out:
        outside = f"leaves its band at step {out[0].number} ({out[0]}), outside at {len(out)} of {len(steps)} steps"
        return "fail", f"{outside}; {without}" if lost else outside
    if lost:
        return "unknown", without
    if not any(step.off for step in steps):
        return "pass", f"equal to the golden curve at all {len(steps)} steps"
    near = max(steps, key=lambda step: (step.off or 0.0) / (step.allowed or inf))
    return "pass", f"in its band at all {len(steps)} steps, nearest to its edge at step {near.number} ({near})"


def _chart(curve: Curve, steps: Sequence[Step], low: int, high: int) -> str:
    kind, told = describe(steps)
    if curve.verdict and curve.verdict != kind:
        kind, told = curve.verdict, escape(f"{curve.why}; each loss {told}" if kind == "pass" else curve.why)
    hover = "".join(
        f'<path d="M{_x(step, steps)} {TOP}V{LOSS_BOTTOM}"><title>step {step.number}: {step}</title></path>'
        for step in steps
    )
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    return (
        f'<figure class="{kind}"><figcaption><h3>{escape(curve.name)}</h3><p>{told}</p></figcaption>'
        f'<svg viewBox="0 0 360 210" role="img" aria-label="{told}">'
        f"{_deviations(steps, low, high)}{_losses(steps)}"
        f'<g class="at" stroke-width="{WIDTH / len(steps):.2f}">{hover}</g></svg>'
        f"<details><summary>figures</summary><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(map(_row, steps))}</tbody></table></details></figure>\n"
    )


def _row(step: Step) -> str:
    loss = "&ndash;" if step.loss is None else f"{step.loss:#.7g}"
    off = "&ndash;" if step.off is None else f"{step.off:.1e}"
    cells = "".join(f"<td>{text}" for text in (loss, f"{step.golden:#.7g}", off, f"{step.allowed:.1e}"))
    return f"<tr class={step.kind}><th scope=row>{step.number}{cells}"


def _x(step: Step, steps: Sequence[Step]) -> float:
    return round(LEFT + (step.number - 0.5) / len(steps) * WIDTH, 1)


def _deviations(steps: Sequence[Step], low: int, high: int) -> str:
    """The upper plot: the band as an area, a mark a step by its kind, and where the curve leaves."""

    def y(share: float) -> float:
        exponent = min(max(log10(share), low), high) if share else low
        return round(BOTTOM - (exponent - low) / (high - low) * (BOTTOM - TOP), 1)

    edge = "".join(f"V{y(step.allowed)}h{WIDTH / len(steps):.2f}" for step in steps)
    parts = [f'<path class="band" d="M{LEFT} {BOTTOM}{edge}V{BOTTOM}z"/>', _grid(EQUAL, "equal")]
    parts += [_grid(y(10.0**e), _power(e)) for e in range(high, low - 1, -1 if high - low <= 5 else -2)]
    line, pen, marks = "", "M", dict.fromkeys(MARKS, "")
    for step in steps:
        at, height = _x(step, steps), EQUAL if step.off == 0 else TOP if step.off is None else y(step.off)
        line += f"{pen}{at} {height}" if step.off else ""
        pen = "L" if step.off else "M"
        marks[step.kind] += f"M{at} {height}{MARKS[step.kind]}"
    if first := next((step for step in steps if step.kind == "out"), None):
        at, end = _x(first, steps), first.number > 0.7 * len(steps)
        parts.append(f'<path class="leaves" d="M{at} {TOP - 12}V{LOSS_BOTTOM}"/>')
        parts.append(
            f'<text class="leaves{" end" * end}" x="{at + (-5 if end else 5)}" y="{TOP - 7}">step {first.number}</text>'
        )
    parts += [f'<path class="{kind}" d="{path}"/>' for kind, path in {"line": line, **marks}.items() if path]
    return "".join(parts)


def _losses(steps: Sequence[Step]) -> str:
    """The lower plot: the golden loss, wide and pale, and the measured one on it."""
    measured = [step.loss if step.off is not None and step.loss is not None else None for step in steps]
    golden = [step.golden for step in steps]
    known = [*golden, *(loss for loss in measured if loss is not None)]
    low, high = min(known), max(known)
    parts = [_grid(LOSS_TOP, f"{high:.3g}"), _grid(LOSS_BOTTOM, f"{low:.3g}")]
    for kind, losses in (("golden", golden), ("loss", measured)):
        path, pen = "", "M"
        for step, loss in zip(steps, losses, strict=True):
            if loss is not None:
                height = LOSS_BOTTOM - (loss - low) / ((high - low) or 1) * (LOSS_BOTTOM - LOSS_TOP)
                path += f"{pen}{_x(step, steps)} {height:.1f}"
            pen = "M" if loss is None else "L"
        parts.append(f'<path class="{kind}" d="{path}"/>' if path else "")
    for step in {steps[0], steps[-1]}:
        parts.append(f'<text class="step" x="{_x(step, steps)}" y="{LOSS_BOTTOM + 13}">{step.number}</text>')
    parts.append(f'<text class="step" x="{LEFT + WIDTH / 2}" y="{LOSS_BOTTOM + 13}">step</text>')
    return "".join(parts)


def _grid(y: float, label: str) -> str:
    return f'<path class="grid" d="M{LEFT} {y}h{WIDTH}"/><text x="{LEFT - 5}" y="{y + 3}">{label}</text>'


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
