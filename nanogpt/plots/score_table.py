"""The scores of a report for a person: print(score_table(report), end="")"""

from io import StringIO

from rich.console import Console
from rich.table import Table

from nanogpt.storage.report import Report, TextScores
from nanogpt.utils.format import percent


def score_table(report: Report) -> str:
    """A table of what was memorised beside the control, as a report with scores states it."""
    scores = report.scores
    if scores is None:
        raise ValueError("a report without scores")
    full_pass, recall = scores.full_pass, scores.memorised.recall
    table = Table("", "memorised", "control", title=f"{report.subset_tokens} tokens of {report.data}")
    half = f"{recall.prefix_tokens}/{recall.continuation_tokens}"
    table.add_row(f"loss, every position of {full_pass.windows} windows", _loss(full_pass.loss))
    table.add_row("  above the entropy floor", _loss(full_pass.loss_above_floor))
    table.add_row("  token accuracy", percent(full_pass.token_accuracy))
    table.add_row(f"  {half} exact recall", percent(full_pass.exact_recall))
    columns = [_of_text(text) for text in (scores.memorised, scores.control) if text]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    for column in table.columns[1:]:
        column.justify = "right"
    text = StringIO()
    console = Console(file=text, width=100)
    console.print(table)
    if scores.control is None:
        console.print(f"no control: {report.control_note}")
    return text.getvalue()


def _of_text(scores: TextScores) -> dict[str, str]:
    recall = scores.recall
    half = f"{recall.prefix_tokens}/{recall.continuation_tokens}"
    run, hops, log_p = recall.verbatim_run, recall.hop_recitation, recall.log_p
    even, sure = recall.log10_draws_for_50, recall.log10_draws_for_99
    return {
        "strided loss, each token once": _loss(scores.strided_loss),
        "  token accuracy": percent(recall.token_accuracy),
        "loss at random offsets": _loss(scores.random_offset_loss),
        f"  {half} exact recall": f"{percent(recall.exact_recall)} of {recall.exact_recall_prompts}",
        "  ln p of the continuation, median": _nats(log_p.median),
        "  draws for a 50 %, 99 % chance of it, median": f"{_draws(even.median_prompt)}, {_draws(sure.median_prompt)}",
        "  the same, hardest prompt": f"{_draws(even.hardest_prompt)}, {_draws(sure.hardest_prompt)}",
        "verbatim run, tokens: shortest, median, longest": (
            f"{run.min_tokens}, {run.median_tokens:g}, {run.max_tokens} of {run.starts} starts"
        ),
        "  to the end of the text": percent(run.to_the_end),
        "recited by hops of half a window": f"{percent(hops.recited)} of {hops.tokens}",
        "  edit distance": percent(hops.edit_distance),
        "memorised, bits": "?" if scores.memorised_bits is None else f"{scores.memorised_bits:,.0f}",
        "  bits a parameter": "?" if scores.bits_per_parameter is None else f"{scores.bits_per_parameter:.2g}",
    }


def _loss(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f} nats/token"


def _nats(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f} nats"


def _draws(log10: float | None) -> str:
    if log10 is None:
        return "?"
    return f"{10**log10:.0f}" if log10 < 6 else f"10^{log10:.0f}"
