"""The scores of a report for a person: print(score_table(report), end="")"""

from io import StringIO

from rich.console import Console
from rich.table import Table

from nanogpt.storage.report import FullPass, Report, TextScores
from nanogpt.utils.format import percent

KNOWN = 0.1  # of a control's prompts: of a text that is new to a model next to none comes back
FEW = 8  # prompts say nothing

Rows = list[tuple[str, str]]  # what a figure is, with its unit, and the figure; a heading has none


def score_table(report: Report) -> str:
    """A table of what was memorised beside the control, as a report with scores states it."""
    scores = report.scores
    if scores is None:
        raise ValueError("a report without scores")
    table = Table("", "memorised text", "control text", title=f"{report.subset_tokens:,} tokens of {report.data}")
    for row in _of_full_pass(scores.full_pass):
        table.add_row(*row)
    columns = [_of_text(text) for text in (scores.memorised, scores.control) if text]
    for rows in zip(*columns, strict=True):
        table.add_row(rows[0][0], *(figure for _, figure in rows))
    for column in table.columns[1:]:
        column.justify = "right"
    text = StringIO()
    console = Console(file=text, width=100, force_jupyter=False)  # which would show it in a notebook itself
    console.print(table)
    if scores.control is None:
        console.print(f"no control: {report.control_note}")
    if warning := control_warning(report):
        console.print(warning)
    return text.getvalue()


def control_warning(report: Report) -> str:
    """That a text which was not trained on comes back as well, or nothing."""
    control = report.scores and report.scores.control
    if not control or control.recall.exact_recall < KNOWN or control.recall.exact_recall_prompts < FEW:
        return ""
    return (
        f"warning: {percent(control.recall.exact_recall)} of the prompts of the control text, which was not trained "
        f"on, come back too: the text repeats itself, its contexts are short, or the first weights knew it"
    )


def _of_full_pass(full_pass: FullPass) -> Rows:
    return [
        (f"full pass: every position of {full_pass.windows:,} windows", ""),
        ("  loss, nats/token", _rounded(full_pass.loss)),
        ("  loss above the entropy floor, nats/token", _rounded(full_pass.loss_above_floor)),
        ("  tokens predicted right", percent(full_pass.token_accuracy)),
        ("  windows whose second half comes back exactly", percent(full_pass.exact_recall)),
    ]


def _of_text(scores: TextScores) -> Rows:
    recall = scores.recall
    prompt, answer = recall.prefix_tokens, recall.continuation_tokens
    run, hops, log_p = recall.verbatim_run, recall.hop_recitation, recall.log_p
    even, sure = recall.log10_draws_for_50, recall.log10_draws_for_99
    return [
        ("each token once, after half a window or more", ""),
        ("  loss, nats/token", _rounded(scores.strided_loss)),
        ("  tokens predicted right", percent(recall.token_accuracy)),
        (f"random prompts of {prompt} tokens, and the {answer} tokens after each", ""),
        ("  loss of both, nats/token", _rounded(scores.random_offset_loss)),
        ("  prompts that bring those tokens back exactly", _share(recall.exact_recall, recall.exact_recall_prompts)),
        ("  log-probability of those tokens, median, nats", _rounded(log_p.median)),
        (
            "  samples for a 50%, 99% chance of them, median prompt",
            f"{_draws(even.median_prompt)}, {_draws(sure.median_prompt)}",
        ),
        ("  the same, hardest prompt", f"{_draws(even.hardest_prompt)}, {_draws(sure.hardest_prompt)}"),
        (f"recited without help, from a start every {prompt} tokens", ""),
        (
            "  tokens right in a row: shortest, median, longest",
            f"{run.min_tokens}, {run.median_tokens:g}, {run.max_tokens}",
        ),
        ("  starts that come to the end of the text", _share(run.to_the_end, run.starts)),
        (f"recited {prompt} tokens at a time, after the true {prompt} before", ""),
        ("  tokens right", _share(hops.recited, hops.tokens)),
        ("  edit distance to the text, share of the tokens", percent(hops.edit_distance)),
        ("memorised beyond how often each token occurs", ""),
        ("  in all, bits", "?" if scores.memorised_bits is None else f"{scores.memorised_bits:,.0f}"),
        ("  a parameter, bits", "?" if scores.bits_per_parameter is None else f"{scores.bits_per_parameter:.2g}"),
    ]


def _rounded(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _share(share: float, number: int) -> str:
    return f"{percent(share)} of {number:,}"


def _draws(log10: float | None) -> str:
    if log10 is None:
        return "?"
    return f"{10**log10:.0f}" if log10 < 6 else f"10^{log10:.0f}"
