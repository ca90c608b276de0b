"""Cross-entropy of every token, whose gradient takes the place of the logits: a CPU's memory traffic is its cost.

losses = TokenCrossEntropy.apply(logits, targets)   # (N,), nats
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**21  # logits whose loss is computed at once: they stay in a CPU's caches


class _Context(Protocol):
    """What autograd keeps between the two passes."""

    needs_input_grad: tuple[bool, bool]
    gradient: Tensor | None  # (N, V), of each row's loss by its logits


class TokenCrossEntropy(torch.autograd.Function):
    """Logits (N, V) and targets (N,) -> their cross-entropies, nats, (N,), in fp32.

    Where a gradient is wanted it is made at once and written over the logits, some rows at a time: nothing else of
    their size is ever there. Torch's own holds three, in fp32.
    """

    @staticmethod
    def forward(ctx: _Context, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.detach()  # the layer that made them does not need them again
        losses = torch.empty(len(logits), device=logits.device)
        rows = max(1, CHUNK // logits.size(1))
        for part, wanted, loss in zip(*(each.split(rows) for each in (logits, targets[:, None], losses)), strict=True):
            log_p = part.log_softmax(dim=-1, dtype=torch.float32)
            torch.neg(log_p.gather(-1, wanted)[:, 0], out=loss)
            if ctx.needs_input_grad[0]:
                part.copy_(log_p.exp_().scatter_add_(-1, wanted, torch.full_like(log_p[:, :1], -1)))
        ctx.gradient = logits
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, scale: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("backward a second time: the gradient was written over the logits, and scaled there")
        return gradient.mul_(scale[:, None]), None
