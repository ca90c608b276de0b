"""The optimizer, and the learning rate that it is given each step."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from nanogpt.distributed.world import World
from nanogpt.optim.adamw import AdamW
from nanogpt.optim.muon import BUFFER, MULTIPLE, MuonAdamW

BETAS = (0.9, 0.95)
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names for Adam's m and v
MOMENTS = (*ADAM_MOMENTS, BUFFER)  # all that an optimizer remembers of a weight


def build_optimizer(
    model: nn.Module, world: World, *, name: str, dtype: str, adamw: type[torch.optim.AdamW] = AdamW
) -> torch.optim.Optimizer:
    """'adamw' or 'muon' (with AdamW beside it), without weight decay, AdamW's update fused into one kernel."""
    if name == "muon":
        return MuonAdamW(model, world, betas=BETAS, dtype=dtype)
    return adamw(model.parameters(), betas=BETAS, weight_decay=0.0, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step; a group may have a multiple of it."""
    for group in optimizer.param_groups:
        own = lr * group.get(MULTIPLE, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def refuse_update(optimizer: torch.optim.Optimizer, refused: Tensor) -> None:
    """Let the next step leave weights and moments as they are where refused, (), is true on the device.

    torch's fused AdamW looks for found_inf, where its gradient scaler sets it; MuonAdamW does so too.
    """
    optimizer.found_inf = refused.float()  # type: ignore[attr-defined]  # torch's scaler sets it in the same way


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let a CUDA graph hold the update: what changes from step to step is read from the device."""
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros((), device=device)
        group["capturable"] = True


def restored_state(weight: Tensor, updates: int, group: dict[str, Any]) -> dict[str, Tensor]:
    """The optimizer's state of one tensor of group after some updates, its moments still to be filled in."""
    if group.get("orthogonal"):
        return {BUFFER: torch.zeros_like(weight)}
    step = torch.tensor(float(updates), device=weight.device)  # as the fused kernel wants it
    return {"step": step, **{moment: torch.zeros_like(weight) for moment in ADAM_MOMENTS}}


def gradient_norm(model: nn.Module) -> Tensor:
    """The L2 norm of the gradient over all parameters, (), in double precision, on the device."""
    return l2_norm(cast(list[Tensor], [p.grad for p in model.parameters()]))  # the backward has made all of them


def l2_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of them all, (), in double precision, on the device."""
    if gradients[0].device.type == "cuda":  # a few kernels for all
        return _norm(torch.stack(torch._foreach_norm(gradients)))
    # Rows first: one fp32 sum over the 38 million squares of the token embedding loses 7e-4 of the norm on a CPU, and
    # takes longer.
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return _norm(torch.cat(rows))


def _norm(norms: Tensor) -> Tensor:
    """Of the whole, by those of its parts, (N,) -> ()."""
    whole: Tensor = (norms if norms.device.type == "mps" else norms.double()).norm()  # MPS has no double precision
    return whole
