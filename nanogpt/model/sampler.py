"""Drawing the next token: temperature, then top-k, then top-p, as transformers' logits warpers do.

choose = make_sampler(torch.Generator().manual_seed(0), temperature=0.8, top_k=50)
choose(logits)   # (B, V) -> token ids (B,)
"""

from collections.abc import Callable

import torch
from torch import Tensor


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits (B, V) whose softmax is to be drawn from: divided by temperature, -inf for tokens that are left out.

    temperature 0 keeps the likeliest token alone. top_k keeps as many of the likeliest, and all that tie with the last.
    top_p keeps the likeliest whose probabilities first add up to it, one at least (nucleus sampling, Holtzman et al.,
    arXiv 1904.09751).
    """
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None:
        rising, tokens = logits.sort()
        left_out = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        left_out[:, -1] = False  # rounding may leave out all
        logits = logits.masked_fill(left_out.scatter(-1, tokens, left_out), float("-inf"))
    return logits


def make_sampler(
    generator: torch.Generator, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Callable[[Tensor], Tensor]:
    """A function that draws a token for each row of logits, (B, V) -> (B,); it advances generator, the CPU's."""

    def draw(logits: Tensor) -> Tensor:
        # On the CPU, whatever the model's device: its random numbers are the same on every machine.
        kept = filter_logits(logits.float().cpu(), temperature=temperature, top_k=top_k, top_p=top_p)
        return torch.multinomial(kept.softmax(dim=-1), 1, generator=generator)[:, 0].to(logits.device)

    return draw
