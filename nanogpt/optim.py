"""The optimizer, and the learning rate that it is given each step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.config import TrainConfig
from nanogpt.eager import AdamW
from nanogpt.muon import BUFFER, MULTIPLE, MuonAdamW
from nanogpt.world import World

BETAS = (0.9, 0.95)
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names for Adam's m and v
MOMENTS = (*ADAM_MOMENTS, BUFFER)  # all that an optimizer remembers of a weight


OPTIMIZERS = {"reference": "adamw", "fast": "muon"}
ADAMW_LR, MUON_LR = 6e-4, 1e-3
MUON_WIDTH = 768  # of the model that MUON_LR was found on


def with_recipe(config: TrainConfig) -> TrainConfig:
    """config with what it leaves to its recipe filled in."""
    optimizer = OPTIMIZERS[config.recipe] if config.optimizer == "auto" else config.optimizer
    # At one rate the singular values of what Muon orthogonalises together go with the root of the width: with this one
    # they are the same at every width.
    rate = ADAMW_LR if optimizer == "adamw" else MUON_LR * sqrt(MUON_WIDTH / config.n_embd)
    return replace(config, optimizer=optimizer, learning_rate=config.learning_rate or rate)


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
    gradients = [p.grad for p in model.parameters()]
    if gradients[0].device.type == "cuda":  # a few kernels for all
        return torch.stack(torch._foreach_norm(gradients)).double().norm()
    # Rows first: one fp32 sum over the 38 million squares of the token embedding loses 7e-4 of the norm on a CPU, and
    # takes longer.
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return torch.cat(rows).double().norm()


# x the target: under it a constant rate hovers, undoing one window's memory with the next one's
PLATEAU = {"adamw": 8.0, "muon": 4.0}
HIGHEST = 1.0  # nats/token that the plateau may begin at: higher up the loss falls best at the constant rate
LOWEST = 0.05  # of the constant rate


def plateau_begins_at(config: TrainConfig) -> float:
    """The loss, nats/token, below which the rate falls and the weights are averaged."""
    return min(HIGHEST, PLATEAU[config.optimizer] * config.target_loss)


def learning_rate(config: TrainConfig, loss: float) -> float:
    """The rate for the next step, given the running estimate of the loss (nats/token).

    Constant; with on_plateau='decay', below the plateau's beginning, with the square root of the loss.
    """
    if config.on_plateau == "none":
        return config.learning_rate
    share = min(1.0, max(LOWEST, sqrt(loss / plateau_begins_at(config))))
    return config.learning_rate * share


class WeightAverage:
    """An exponential moving average of weights, which full passes judge in their place.

    At a rate that still learns, each step remembers its own windows better than the others'; the mean of the last
    1 / (1 - decay) weights remembers all of them (Polyak and Juditsky, 1992). weights: what this rank holds of them, in
    any dtype; the average is kept in fp32.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self._weights = list(weights)
        self._mean: list[Tensor] = []  # as long as nothing has been averaged
        self._decay = decay

    @property
    def mean(self) -> list[Tensor]:
        """The average, laid out as the weights are; empty when nothing has been averaged."""
        return self._mean

    def begin(self) -> list[Tensor]:
        """Room for an average that is read from elsewhere -> the tensors to fill."""
        self._mean = [torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) for weight in self._weights]
        return self._mean

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now into the average."""
        now = [weight.float() for weight in self._weights]  # themselves, where they are fp32
        if not self._mean:
            self._mean = [weight.detach().clone() for weight in now]
        torch._foreach_lerp_(self._mean, now, 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the weights' place inside, the weights again after; nothing when nothing was averaged."""
        kept = [weight.detach().clone() for weight in self._weights] if self._mean else []
        _write(self._weights, self._mean)
        try:
            yield
        finally:
            _write(self._weights, kept)


@torch.no_grad()
def _write(weights: list[Tensor], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=False):  # values is empty where there is nothing to write
        weight.copy_(value)
