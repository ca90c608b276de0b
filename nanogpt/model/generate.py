"""Greedy decoding of many prompts of one length at once, past the context length, with one KV cache.

said, margins = decode_greedily(model, prompts, 32, context_length=64)   # prompts (B, P) -> each (B, 32)
"""

import torch
from torch import Tensor

from nanogpt.model.gpt import GPT, KVCache, evaluating


class Decoder:
    """B sequences of one length, which grow by the tokens that are appended to them.

    When context_length positions are full it hops: it reads the second part of them again from position 0, because the
    model was trained on no later position.
    """

    def __init__(self, model: GPT, prompts: Tensor, *, context_length: int) -> None:
        """prompts: (B, P) on the model's device; B may be 0. Raises ValueError where P is."""
        if not prompts.size(1):
            raise ValueError("the prompt must hold at least one token")
        weight = model.lm_head.weight
        self._model, self._context_length = model, context_length
        self._keep = context_length - hop_length(context_length) + 1  # the next window's part of the known tokens
        self._ids = prompts
        self._unread = prompts if prompts.size(1) <= context_length else prompts[:, -self._keep :]
        self._cache = KVCache(model.config, len(prompts), context_length, device=weight.device, dtype=weight.dtype)

    def logits(self) -> Tensor:
        """Logits of the next token, (B, V). Call it once, then append."""
        with evaluating(self._model):
            logits: Tensor = self._model(self._unread, cache=self._cache)  # (B, T, V)
        return logits[:, -1]

    def append(self, tokens: Tensor) -> None:
        """Take tokens (B,) as the next ones."""
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        if self._cache.used == self._context_length:
            self._cache.used = 0
            self._unread = self._ids[:, -self._keep :]
        else:
            self._unread = self._ids[:, -1:]


def decode_greedily(model: GPT, prompts: Tensor, count: int, *, context_length: int) -> tuple[Tensor, Tensor]:
    """The count tokens that follow each of prompts (B, P), and by how much logit each beat its best rival: (B, count).

    It makes as many forward passes whatever is said, so that ranks whose forward is a collective stay together.
    """
    decoder = Decoder(model, prompts, context_length=context_length)
    said, margins = [], []
    for _ in range(count):
        best, tokens = decoder.logits().float().topk(2, dim=-1)  # (B, 2)
        said.append(tokens[:, 0])
        margins.append(best[:, 0] - best[:, 1])
        decoder.append(tokens[:, 0])
    return torch.stack(said, dim=1), torch.stack(margins, dim=1)


def hop_length(context_length: int) -> int:
    """How many tokens a recitation takes from a full context before it starts again from the context's second part."""
    return max(1, context_length // 2)


def second_half(context_length: int) -> slice:
    """Of a window's targets (..., context_length), those that are recited after its first half.

    The last target is not among them: it stands one past the context.
    """
    return slice(hop_length(context_length) - 1, context_length - 1)  # the first target is the second token
