"""What was memorised and what was not, as figures, beside the same figures of a text that was not trained on.

    card = make_scorecard(model, windows, judged, control, forward, floor=0.036)
    card.values().memorised.recall.exact_recall

Every score knows how far other kernels, which round otherwise, may move it: a loss by a tolerance, a count by the
tokens whose decision is a near tie. That is how far a recomputation may be off (docs/explanation/proof.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, exp, inf, log, log1p, log10

from rapidfuzz.distance import Levenshtein
from torch import Tensor

from nanogpt.data.windows import Windows
from nanogpt.evaluate.recall import (
    Forward,
    Reading,
    RecitedText,
    hop_starts,
    in_order,
    longest_run,
    read,
    recite_text,
    verbatim_runs,
)
from nanogpt.model.generate import hop_length, second_half
from nanogpt.model.gpt import GPT
from nanogpt.storage.json_file import finite, from_json
from nanogpt.storage.report import Scores

RECALL_PROMPTS = 256  # random offsets that exact recall is measured at; all of them in a shorter text
CONTROL_PROMPTS = 64  # the same in the control
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


@dataclass(frozen=True)
class Rounding:
    """How far two kernels may differ in one precision."""

    absolute: float  # of a mean loss, nats
    relative: float  # of a mean loss
    margin: float  # of two logits: which is larger is certain beyond it


# In fp32 one machine repeats itself to 1e-6, other kernels to some 1e-5 of a logit; bf16 has 8 bits.
ROUNDINGS = {"fp32": Rounding(1e-5, 1e-4, 1e-3), "bf16": Rounding(2e-3, 2e-2, 0.25)}


@dataclass(frozen=True)
class Score:
    """A figure, and the interval in which whoever recomputes it must find it."""

    value: float
    low: float
    high: float


Tree = dict[str, "Score | Tree"]  # of a dataclass of nanogpt/storage/report.py, by its keys


@dataclass(frozen=True)
class Scorecard:
    """The scores of a run and the recitations that they were read off; the same on every rank."""

    scores: Tree
    recited: RecitedText
    control: RecitedText | None

    def values(self) -> Scores:
        """The figures alone, as report.json holds them."""
        return from_json(Scores, finite(_values(self.scores)))

    def flat(self) -> Iterator[tuple[str, Score]]:
        """Every score with its place in report.json, as 'recall.exact_recall'."""
        return _flat(self.scores)


def make_scorecard(
    model: GPT,
    windows: Windows,
    judged: Tensor,
    control: Windows | None,
    forward: Forward,
    *,
    floor: float,
    full: Reading | None = None,
) -> Scorecard:
    """All scores of a model that has memorised windows. Every rank must call.

    judged: starts of the windows of a full pass. control: a text that it was not trained on, or None where there is
    too little. floor: the entropy floor, nats/token. full: the judged windows, where forward has read them already.
    """
    exactness = _Exactness(ROUNDINGS[forward.dtype])
    full = full or read(model, windows, judged, forward)
    loss = full.loss
    mine, recited = _of_text(model, windows, RECALL_PROMPTS, forward, exactness)
    scores: Tree = {
        "floor": Score(floor, floor - 1e-9, floor + 1e-9),
        "full_pass": {
            "windows": _exact(len(judged)),
            "loss": exactness.nats(loss),
            "loss_above_floor": exactness.nats(loss - floor, of=loss),
            "token_accuracy": exactness.count(_mean, full.right, full.margin),
            "exact_recall": exactness.count(_share_of_windows(windows), full.right, full.margin),
        },
        **mine,
    }
    if control is None:
        return Scorecard({**scores, "control": {}}, recited, None)
    theirs, said = _of_text(model, control, CONTROL_PROMPTS, forward, exactness)
    return Scorecard({**scores, "control": theirs}, recited, said)


def come_back(windows: Windows, right: Tensor) -> Tensor:
    """Which windows come back, (W,) bool: their second half exactly; right: (W, T), as a Reading has it."""
    return right[:, second_half(windows.context_length)].all(dim=1)


def window_recall(windows: Windows, full: Reading) -> float:
    """Exact recall of the windows of a full pass."""
    return _share_of_windows(windows)(full.right)


def is_by_heart(windows: Windows, hops: Reading) -> bool:
    """Whether all of the text is recited from its beginning without a break; hops: of the windows at hop_starts."""
    return bool(in_order(hops.right, windows)[hop_length(windows.context_length) - 1 :].all())


def _of_text(
    model: GPT, windows: Windows, prompts: int, forward: Forward, exactness: "_Exactness"
) -> tuple[Tree, RecitedText]:
    """The scores of one text."""
    chosen = windows.random_starts(prompts)
    anywhere = read(model, windows, chosen, forward)
    hops = read(model, windows, hop_starts(windows), forward)
    told = recite_text(model, windows, hops, forward)
    nll = in_order(hops.nll, windows).double()
    right, margin = in_order(hops.right, windows), in_order(hops.margin, windows)
    prefix = hop_length(windows.context_length)
    recited, near = right[prefix - 1 :], margin[prefix - 1 :]
    reference, parameters = _unigram_nats(windows.ids), model_parameters(model)
    gained = reference - nll.sum().item()
    # Never below 0: a model that predicts worse than token frequencies holds nothing of the text.
    # In this order NaN, of a model that is broken, stays NaN.
    bits, unsure = max(gained, 0.0) / log(2), exactness.slack(nll.mean().item()) * len(nll) / log(2)
    return {
        "strided_loss": exactness.nats(nll.mean().item()),
        "random_offset_loss": exactness.nats(anywhere.loss),
        "reference_loss": exactness.nats(reference / len(nll)),
        "memorised_bits": Score(bits, bits - unsure, bits + unsure),
        "bits_per_parameter": Score(*(x / parameters for x in (bits, bits - unsure, bits + unsure))),
        "recall": {
            "exact_recall": exactness.count(_share_of_windows(windows), anywhere.right, anywhere.margin),
            "exact_recall_prompts": _exact(len(chosen)),
            "prefix_tokens": _exact(prefix),
            "continuation_tokens": _exact(windows.context_length - prefix),
            "token_accuracy": exactness.count(_mean, right, margin),
            "recited_tokens": _exact(len(recited)),
            "recitation_breaks": exactness.count(lambda x: int((~x).sum()), recited, near),
            "first_break_token": exactness.count(lambda x: _first_break(x, prefix), recited, near),
            "longest_verbatim_tokens": exactness.count(longest_run, recited, near),
            "verbatim_run": _runs(windows, hops, exactness),
            "hop_recitation": _recitation(told, prefix, exactness),
            **_extraction(windows, anywhere, exactness),
        },
    }, told


def _runs(windows: Windows, hops: Reading, exactness: "_Exactness") -> Tree:
    """How far the text comes back from each start half a window apart, without help and without a cap."""
    whole = len(windows.ids) - hop_starts(windows) - hop_length(windows.context_length)  # up to the end of the text

    def of(figure: Callable[[Tensor], float]) -> Score:
        return exactness.count(lambda right: figure(verbatim_runs(right, windows)), hops.right, hops.margin)

    return {
        "starts": _exact(len(whole)),
        "min_tokens": of(lambda runs: int(runs.min())),
        "median_tokens": of(lambda runs: runs.double().quantile(0.5).item()),
        "max_tokens": of(lambda runs: int(runs.max())),
        "to_the_end": of(lambda runs: _mean(runs == whole)),
    }


def _recitation(told: RecitedText, hop: int, exactness: "_Exactness") -> Tree:
    """The recitation by hops, where each mistake spoils what follows it in its hop."""
    said, ids, recited = (x[hop:] for x in (told.said, told.ids, told.recited))
    pairs = zip(said.split(hop), ids.split(hop), strict=True)
    edits = sum(Levenshtein.distance(a.tolist(), b.tolist()) for a, b in pairs)
    unsure = int((told.margin[hop:] < exactness.rounding.margin).sum())  # all that follows a near tie may be otherwise
    return {
        "tokens": _exact(len(ids)),
        "recited": exactness.count(_mean, recited, told.margin[hop:]),
        # Levenshtein distance of each hop to the text, in tokens, over the length of both.
        "edit_distance": Score(*(x / len(ids) for x in (edits, edits - unsure, edits + unsure))),
    }


def _extraction(windows: Windows, anywhere: Reading, exactness: "_Exactness") -> Tree:
    """How likely sampling, at temperature 1 from all tokens, gives the second half of a window after its first.

    (n, p)-discoverable extraction (Hayes et al., arXiv 2410.19482): n draws give it at least once with probability p.
    """
    log_p = -anywhere.nll[:, second_half(windows.context_length)].double().sum(dim=1)
    tokens = windows.context_length - hop_length(windows.context_length)
    slack = exactness.slack(-log_p.mean().item() / tokens) * tokens
    found = {name: log_p.quantile(q).item() for name, q in QUANTILES.items()}
    prompts = {"median_prompt": "median", "hardest_tenth": "p10", "hardest_prompt": "min"}
    return {
        "log_p": {name: Score(x, x - slack, x + slack) for name, x in found.items()},
        **{
            f"log10_draws_for_{round(100 * p)}": {
                name: Score(*(draws_log10(found[at] + s, p) for s in (0.0, slack, -slack)))
                for name, at in prompts.items()
            }
            for p in (0.5, 0.99)
        },
    }


def draws_log10(log_p: float, p: float) -> float:
    """log10 of the n whose n draws of probability exp(log_p) succeed at least once with probability p; n is whole."""
    if not log_p > -30:  # n too large to be counted out, or not a number
        return (log(-log1p(-p)) - log_p) / log(10)
    return log10(max(1, ceil(log1p(-p) / log1p(-exp(min(log_p, -1e-12))))))


def model_parameters(model: GPT) -> int:
    """As GPT.num_parameters, of a model that ZeRO 3 has shared out too."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _unigram_nats(ids: Tensor) -> float:
    """Nats of all tokens but the first under the token frequencies of ids itself.

    No other table of frequencies describes the text as well, so what a model knows beyond it is no matter of words.
    """
    return -(ids.bincount()[ids[1:]].double() / len(ids)).log().sum().item()


def _share_of_windows(windows: Windows) -> Callable[[Tensor], float]:
    """The share of windows (W, T) whose second half comes back exactly: discoverable extraction.

    Carlini et al., arXiv 2202.07646.
    """
    return lambda right: _mean(come_back(windows, right))


def _first_break(right: Tensor, prefix: int) -> float:
    breaks = (~right).nonzero()
    return int(breaks[0]) + prefix if len(breaks) else inf


def _mean(marks: Tensor) -> float:
    return marks.double().mean().item()


def _exact(value: int) -> Score:
    return Score(value, value, value)


@dataclass(frozen=True)
class _Exactness:
    """Makes scores that know how exact they are."""

    rounding: Rounding

    def slack(self, loss: float) -> float:
        return self.rounding.absolute + self.rounding.relative * abs(loss)

    def nats(self, value: float, of: float | None = None) -> Score:
        """A loss, or what is left of the loss `of`."""
        slack = self.slack(value if of is None else of)
        return Score(value, value - slack, value + slack)

    def count(self, score: Callable[[Tensor], float], right: Tensor, margin: Tensor) -> Score:
        """score of right, and of right with all near ties lost and all won; score must be monotone."""
        near = margin < self.rounding.margin
        ends = score(right & ~near), score(right | near)
        return Score(score(right), min(ends), max(ends))


def _values(scores: Tree) -> dict[str, object]:
    return {k: v.value if isinstance(v, Score) else _values(v) or None for k, v in scores.items()}


def _flat(scores: Tree, prefix: str = "") -> Iterator[tuple[str, Score]]:
    for name, score in scores.items():
        if isinstance(score, Score):
            yield prefix + name, score
        else:
            yield from _flat(score, f"{prefix}{name}.")
