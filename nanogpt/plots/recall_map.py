"""The memorised text, and how each part of it came back: what recall.png and the page of it have in common.

    pieces = cut(card.recited)
    [(piece.text, piece.said) for piece in pieces if piece.mark is Mark.WRONG]
    headline("builtin", report)

Tokens are marked, and counted, one by one. What is shown is cut into pieces, which hold whole characters: byte pairs
may split one, and half a character cannot be shown.
"""

import codecs
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from nanogpt.data.tokenizer import encoding
from nanogpt.evaluate.recall import RecitedText
from nanogpt.storage.report import Report
from nanogpt.utils.format import counted, last_names, percent

LEAST_SHARE = 0.1  # of a column of the overview: one lost token among hundreds must be seen
NAME_WIDTH = 60  # characters of a file's name in a headline


class Mark(IntEnum):
    """How a token came back, the worst last."""

    GIVEN = 0
    RECITED = 1
    PREDICTED = 2
    WRONG = 3


NAMES = {
    Mark.GIVEN: "given as the first prompt",
    Mark.RECITED: "recited",
    Mark.PREDICTED: "predicted, not recited",
    Mark.WRONG: "wrong",
}
# Apart by 14 and more of CIELAB, what counts by 25, also as the three kinds of colour blindness see them (simulated
# after Machado et al. 2009).
COLOURS = {Mark.GIVEN: "#DADADA", Mark.RECITED: "#C3E0F8", Mark.PREDICTED: "#FFDD7A", Mark.WRONG: "#EE7038"}


@dataclass(frozen=True)
class Piece:
    """The fewest tokens that are whole characters: nearly always one."""

    token: int  # its first
    tokens: int  # how many
    text: str
    mark: Mark  # the worst of its tokens
    said: bytes  # by the model in place of these tokens, where any of them did not come back; else empty
    hop: int  # that its first token was recited in, of those after the first prompt; -1 in it


def marks(recited: RecitedText) -> Tensor:
    """(N,) uint8: the Mark of each token.

    After a mistake the same token as in the text may be said though the true text would not have led there: recited.
    """
    mark = torch.full((len(recited.ids),), int(Mark.WRONG), dtype=torch.uint8)
    mark[recited.predicted] = Mark.PREDICTED
    mark[recited.recited] = Mark.RECITED
    mark[recited.said < 0] = Mark.GIVEN
    return mark


def cut(recited: RecitedText) -> list[Piece]:
    """The text in order: the texts of the pieces together are the text. A last character that is cut is U+FFFD."""
    token_bytes = encoding().decode_single_token_bytes
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids, said, mark = recited.ids.tolist(), recited.said.tolist(), marks(recited).tolist()
    prompt = int((recited.said < 0).sum())  # as long as each hop
    pieces, first, text = [], 0, ""
    for i, token in enumerate(ids):
        text += utf8.decode(token_bytes(token), final=i + 1 == len(ids))
        if utf8.getstate()[0]:  # a character goes on in the next token
            continue
        worst = Mark(max(mark[first : i + 1]))
        told = b"".join(token_bytes(t) for t in said[first : i + 1] if t >= 0) if worst > Mark.RECITED else b""
        pieces.append(Piece(first, i + 1 - first, text, worst, told, first // prompt - 1))
        first, text = i + 1, ""
    return pieces


def is_lost(piece: Piece) -> bool:
    """Whether any token of it was to be recited, and was not."""
    return piece.mark > Mark.RECITED


def overview(mark: Tensor, columns: int) -> Tensor:
    """marks (N,) -> (C, 4): how high each Mark stands in each column of a strip that shows all tokens; rows sum to 1.

    At most `columns`, and a token each where they suffice. A loss is drawn as at least LEAST_SHARE of its column's
    tokens, so that it can be seen.
    """
    columns = min(columns, len(mark))
    column = torch.arange(len(mark)) * columns // len(mark)
    counts = (column * len(Mark) + mark.long()).bincount(minlength=columns * len(Mark)).view(columns, len(Mark))
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    lost = share[:, Mark.PREDICTED :]
    lost[lost > 0] = lost[lost > 0].clamp(min=LEAST_SHARE)
    return share / share.sum(dim=1, keepdim=True)


def tally(mark: Tensor) -> dict[Mark, str]:
    """'recited: 1,964 (97.4%)' and so on, of marks (N,); the shares are of what was to be recited."""
    count = dict(zip(Mark, mark.long().bincount(minlength=len(Mark)).tolist(), strict=True))
    asked = len(mark) - count[Mark.GIVEN]
    return {
        which: f"{NAMES[which]}: {n:,}" + (f" ({percent(n / asked)})" if which is not Mark.GIVEN else "")
        for which, n in count.items()
    }


def headline(data: str, report: Report) -> list[str]:
    """What the scores say, in two sentences. report: with scores."""
    outcome = "target reached" if report.reached else f"target NOT reached ({report.exit_reason})"
    recall, name = report.recall, last_names(data)
    name = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"
    loss = "not finite" if report.loss is None else f"{report.loss:.4f}"
    return [
        f"{report.subset_tokens:,} tokens of {name}; {outcome}: full-pass loss {loss} (target {report.target_loss:g})",
        f"{percent(recall.exact_recall)} of {recall.exact_recall_prompts} random prompts of "
        f"{recall.prefix_tokens} tokens bring back the next {recall.continuation_tokens} tokens exactly; "
        f"longest free run {counted(recall.verbatim_run.max_tokens, 'token')}. Below, every {recall.prefix_tokens} "
        f"tokens are recited after the {recall.prefix_tokens} true tokens before them",
    ]
