"""What the model has memorised: losses over the whole text, exact recall, recitation.

    loss = full_pass(model, windows, windows.judged_starts(8), Forward(world, dtype="fp32", rows=16))

Greedy decoding gets token j right, after only right ones, exactly when the argmax at j given the *true* prefix is
right. So exact recall, the first divergence and the longest verbatim run are read off ordinary forward passes, many
windows at once, with no token generated one by one; tests compare that with real decoding. Scores are computed in the
run's dtype; `recite` decodes in fp32, where a near tie may fall the other way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.data import Windows, hop_length
from nanogpt.model import GPT, evaluating
from nanogpt.world import World

RECALL_PROMPTS = 256  # random offsets that exact recall is measured at; all of them in a shorter text


@dataclass(frozen=True)
class Forward:
    """How to run the model forward, within the memory that a training step needs."""

    world: World
    dtype: str  # 'bf16' or 'fp32'
    rows: int  # windows that a rank holds at once
    before_part: Callable[[], None] = lambda: None  # called as often on every rank; it may raise to end the pass

    def parts(self, items: Tensor) -> Iterator[Tensor]:
        """This rank's share of items along their first dimension, `rows` at a time."""
        for part in self.world.parts(items, self.rows):
            self.before_part()
            yield part


@dataclass(frozen=True)
class Recitation:
    """The text token by token, each predicted once from the true tokens before it, by half-window hops."""

    loss: float  # mean over all tokens but the first, nats: the usual sliding-window loss
    correct: Tensor  # (N - 1,) bool: whether the argmax was token i + 1


def full_pass(model: GPT, windows: Windows, starts: Tensor, forward: Forward) -> float:
    """Token-weighted mean loss, nats per token, over every position of the windows at starts (W,), on every rank.

    The windows are shared out over the ranks; every rank must call, and every rank gets the result.
    """
    world = forward.world
    loss_sum = torch.zeros((), device=world.device)
    count = 0
    with evaluating(model):
        for mine in forward.parts(starts):
            idx, targets = windows.take(mine)
            with world.autocast(forward.dtype):
                loss_sum += model(idx.to(world.device), targets.to(world.device))
            count += targets.numel()
    total, tokens = world.sum(loss_sum.item(), count)
    return total / tokens


def recall_at(model: GPT, windows: Windows, starts: Tensor, forward: Forward) -> tuple[float, float]:
    """For the windows at starts: the share that comes back exactly after its first half, and the mean loss.

    Greedily, every token of the second half of the context. With a context of 64 this is 32/32 discoverable extraction
    (Carlini et al., arXiv 2202.07646).
    """
    prefix, length = hop_length(windows.context_length), windows.context_length
    exact = nll_sum = 0.0
    count = 0
    for part in forward.parts(starts):
        correct, nll = _teacher_forced(model, windows, part, forward)
        # The last target stands one past the context: a window of T tokens holds T - prefix to recite.
        exact += correct[:, prefix - 1 : length - 1].all(dim=1).sum().item()
        nll_sum += nll.sum().item()
        count += len(part)
    exact, nll_sum, count = forward.world.sum(exact, nll_sum, count)
    return exact / count, nll_sum / (count * length)


def scorecard(model: GPT, windows: Windows, forward: Forward) -> dict[str, Any]:
    """What a report says of the memory besides the window loss; the same on every rank.

    strided_loss: mean over the tokens of the text, each counted once. random_offset_loss: the window loss at random
    offsets, which a fixed grid does not train on. exact_recall: 32/32 greedy extraction at the same offsets (half
    a context each way, whatever its length). The rest is of one recitation of the whole text from its first half
    context, put right wherever it breaks.
    """
    prefix = hop_length(windows.context_length)
    chosen = windows.random_starts(RECALL_PROMPTS)
    exact, random_offset_loss = recall_at(model, windows, chosen, forward)
    told = recite_all(model, windows, forward)
    recited = told.correct[prefix - 1 :]
    breaks = (~recited).nonzero().flatten()
    return {
        "strided_loss": told.loss,
        "random_offset_loss": random_offset_loss,
        "recall": {
            "exact_recall": exact,
            "exact_recall_prompts": len(chosen),
            "prefix_tokens": prefix,
            "continuation_tokens": windows.context_length - prefix,
            "token_accuracy": told.correct.float().mean().item(),
            "recited_tokens": len(recited),
            "recitation_breaks": len(breaks),
            "first_break_token": int(breaks[0]) + prefix if len(breaks) else None,
            "longest_verbatim_tokens": longest_run(recited),
        },
    }


def recite_all(model: GPT, windows: Windows, forward: Forward) -> Recitation:
    """The whole text by hops: every token but the first is predicted once, from the true tokens before it.

    The first window gives all its targets, each later one those that the one before did not reach. These are the
    contexts that `generate` has when it recites the text from its beginning. Every rank gets the result.
    """
    hop = hop_length(windows.context_length)
    starts = torch.arange(0, windows.last_start + hop, hop).clamp(max=windows.last_start)
    ends = starts + windows.context_length  # target t, the token at t + 1, is the last of the window that ends at t + 1
    begins = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    correct = torch.zeros(windows.ids.numel() - 1, device=forward.world.device)
    nll = torch.zeros_like(correct)
    for mine in forward.parts(torch.stack([starts, begins, ends], dim=1)):
        right, loss = _teacher_forced(model, windows, mine[:, 0], forward)
        for (start, begin, end), r, x in zip(mine.tolist(), right, loss, strict=True):
            correct[begin:end] = r[begin - start :].float()
            nll[begin:end] = x[begin - start :]
    forward.world.sum_tensor(correct)
    forward.world.sum_tensor(nll)
    return Recitation(loss=nll.mean().item(), correct=correct.bool().cpu())


def longest_run(correct: Tensor) -> int:
    """Length of the longest stretch of True in correct (N,)."""
    wrong = torch.cat([torch.tensor([-1]), (~correct).nonzero().flatten(), torch.tensor([len(correct)])])
    return int(wrong.diff().max()) - 1


def _teacher_forced(model: GPT, windows: Windows, starts: Tensor, forward: Forward) -> tuple[Tensor, Tensor]:
    """For the windows at starts (W,): argmax right (W, T) and cross-entropy in nats (W, T), from the true prefix."""
    idx, targets = (x.to(forward.world.device) for x in windows.take(starts))
    with evaluating(model):
        with forward.world.autocast(forward.dtype):
            logits = model(idx)  # (W, T, V)
        # Flat: over a middle dimension, (W, V, T), torch's CPU kernel is wrong by up to 2e-4 nats.
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
        return logits.argmax(dim=-1) == targets, nll
