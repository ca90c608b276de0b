"""What the model has memorised: forward passes over windows of the text, and what is read off them.

    loss = full_pass(model, windows, windows.judged_starts(8), Forward(world, dtype="fp32", rows=16))
    reading = read(model, windows, hop_starts(windows), Forward(world, dtype="fp32", rows=16))
    longest_run(in_order(reading.right, windows))

Greedy decoding gets token j right, after only right ones, exactly when the argmax at j given the *true* prefix is
right. So exact recall, the first divergence and the verbatim run from any window are read off ordinary forward passes,
many windows at once, with no token generated; tests compare that with real decoding. What is said *after* a mistake has
to be decoded: recite_text.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.data.windows import Windows
from nanogpt.distributed.world import World
from nanogpt.model.generate import decode_greedily, hop_length, second_half
from nanogpt.model.gpt import GPT, evaluating


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
class Reading:
    """The targets of W windows, each predicted from the true tokens before it in its window; the same on every rank.

    What other kernels, which round otherwise, could turn is known by its margin. On the CPU.
    """

    right: Tensor  # (W, T) bool: the true token is the argmax
    margin: Tensor  # (W, T): by how much logit it beats the best other, or is beaten
    nll: Tensor  # (W, T): cross-entropy, nats

    @property
    def loss(self) -> float:
        """Mean over all targets, nats/token."""
        return self.nll.double().mean().item()


@dataclass(frozen=True)
class RecitedText:
    """The whole text as the model recites it by hops of half a window (P tokens), token by token.

    Tokens kP to kP + P are decoded greedily, freely, after a prompt of the P true tokens before them and nothing else,
    for every k from 1 on. So each token but the first P is recited once, and a mistake spoils its own hop at most.
    """

    ids: Tensor  # (N,) the memorised tokens
    predicted: Tensor  # (N,) bool: the argmax after the true tokens from its hop's prompt on is right; the first: False
    said: Tensor  # (N,) what the model said there; -1 in the first prompt
    recited: Tensor  # (N,) bool: said is ids
    margin: Tensor  # (N,) by how much logit what was said beat its best rival, the least since its hop began


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


def read(model: GPT, windows: Windows, starts: Tensor, forward: Forward) -> Reading:
    """Every target of the windows at starts (W,), which may run over the end of the text: those targets mean nothing.

    The windows are shared out over the ranks; every rank must call, and every rank gets the result.
    """
    world, length = forward.world, windows.context_length
    truth, rival, others = torch.zeros(3, len(starts), length, device=world.device)
    with evaluating(model):
        for mine in forward.parts(torch.stack([torch.arange(len(starts)), starts], dim=1)):
            rows, at = mine.to(world.device)[:, 0], mine[:, 1, None] + torch.arange(length + 1)
            window = windows.ids[at.clamp(max=len(windows.ids) - 1)].to(world.device)
            idx, targets = window[:, :-1], window[:, 1:, None]
            with world.autocast(forward.dtype):
                logits = model(idx).float()  # (W, T, V)
            truth[rows] = logits.gather(-1, targets)[..., 0]
            logits.scatter_(-1, targets, float("-inf"))
            rival[rows], others[rows] = logits.amax(dim=-1), logits.logsumexp(dim=-1)
    truth, rival, others = world.sum_tensor(torch.stack([truth, rival, others])).cpu()
    # -ln p = ln(1 + sum over the others of exp(logit - truth)): exact where p is nearly 1, as in a text memorised well.
    return Reading(right=truth > rival, margin=(truth - rival).abs(), nll=F.softplus(others - truth))


def possible_recall(windows: Windows, starts: Tensor) -> float:
    """The most exact recall that any model can have of the windows at starts (W,).

    Greedily a prompt has one continuation: of windows whose first half is the same only those are recalled whose second
    half is the most frequent one.
    """
    hop, part = hop_length(windows.context_length), second_half(windows.context_length)
    ids = windows.ids.tolist()
    continuations: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
    for start in starts.tolist():
        prompt, rest = ids[start : start + hop], ids[start + hop : start + part.stop + 1]
        continuations.setdefault(tuple(prompt), Counter())[tuple(rest)] += 1
    return sum(max(counts.values()) for counts in continuations.values()) / len(starts)


def hop_starts(windows: Windows) -> Tensor:
    """Where the windows of a recitation begin, half a window apart, (W,): after each one's first half the text goes on.

    The last ones run over its end.
    """
    hop = hop_length(windows.context_length)
    return torch.arange(0, len(windows.ids) - hop, hop)


def in_order(figures: Tensor, windows: Windows) -> Tensor:
    """figures (W, T) of the windows at hop_starts -> (N - 1,): of each token of the text but the first, once.

    The first window gives all its targets, each later one those that the one before did not reach: those are the
    contexts that `generate` has when it recites the text from its beginning.
    """
    token = torch.arange(1, len(windows.ids))
    hop = hop_length(windows.context_length)
    window = ((token - windows.context_length + hop - 1) // hop).clamp(min=0)
    return figures[window, token - 1 - window * hop]


def verbatim_runs(right: Tensor, windows: Windows) -> Tensor:
    """How many tokens come back one after another, freely, after the first half of each window at hop_starts: (W,).

    right: (W, T) of these windows, before any mistake the contexts of `generate`. A run ends with the text.
    """
    count, length, hop = len(windows.ids), windows.context_length, hop_length(windows.context_length)
    position = torch.arange(count + 1)
    wrong = torch.cat([torch.tensor([False]), ~in_order(right, windows), torch.tensor([True])])  # the end stops all
    stop = torch.where(wrong, position, count).flip(0).cummin(0).values.flip(0)  # (N + 1,): the next wrong token
    starts = hop_starts(windows)[:, None]
    token = starts + torch.arange(1, length + 1)  # (W, T)
    inside = torch.where(~right & (token >= starts + hop) & (token < count), token, count).amin(dim=1)
    after = stop[(starts[:, 0] + length + 1).clamp(max=count)]
    return torch.minimum(inside, after) - starts[:, 0] - hop


def longest_run(correct: Tensor) -> int:
    """Length of the longest stretch of True in correct (N,)."""
    wrong = torch.cat([torch.tensor([-1]), (~correct).nonzero().flatten(), torch.tensor([len(correct)])])
    return int(wrong.diff().max()) - 1


def recite_text(model: GPT, windows: Windows, reading: Reading, forward: Forward) -> RecitedText:
    """The text recited by hops, on every rank; every rank must call. reading: of the windows at hop_starts."""
    world, ids, hop = forward.world, windows.ids, hop_length(windows.context_length)
    starts = hop_starts(windows)
    said = torch.zeros(len(starts), hop, dtype=torch.long, device=world.device)
    margin = torch.zeros(len(starts), hop, device=world.device)
    # A token costs a pass over all weights, however many rows take it. Of four rows half a window at once, without
    # gradients, needs no more memory than a training step of one.
    wide = replace(forward, rows=4 * forward.rows)
    for mine in wide.parts(torch.stack([torch.arange(len(starts)), starts], dim=1)):
        rows = mine.to(world.device)[:, 0]
        prompts = ids[mine[:, 1, None] + torch.arange(hop)].to(world.device)
        with world.autocast(forward.dtype):
            said[rows], margin[rows] = decode_greedily(model, prompts, hop, context_length=windows.context_length)
    said, margin = world.sum_tensor(said).cpu(), world.sum_tensor(margin).cpu()
    told = torch.cat([torch.full((hop,), -1), said.flatten()])[: len(ids)]
    least = torch.cat([torch.full((hop,), float("inf")), margin.cummin(dim=1).values.flatten()])[: len(ids)]
    token = torch.arange(1, len(ids))
    window = (token // hop - 1).clamp(min=0)
    predicted = torch.cat([torch.tensor([False]), reading.right[window, token - 1 - window * hop]])
    return RecitedText(ids=ids, predicted=predicted, said=told, recited=told == ids, margin=least)
