"""The optimizer, and the learning rate that it is given each step."""

from math import sqrt

import torch
from torch import Tensor, nn

from nanogpt.config import TrainConfig

BETAS = (0.9, 0.95)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without weight decay, its update fused into one kernel; the engine sets the learning rate each step."""
    return torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0.0, fused=True)


PLATEAU = 8.0  # x the target: under it a constant rate hovers, undoing one window's memory with the next one's
HIGHEST = 1.0  # nats/token that the plateau may begin at: higher up the loss falls best at the constant rate
LOWEST = 0.05  # of the constant rate


def plateau_begins_at(config: TrainConfig) -> float:
    """The loss, nats/token, below which the rate falls and the weights are averaged."""
    return min(HIGHEST, PLATEAU * config.target_loss)


def learning_rate(config: TrainConfig, loss: float) -> float:
    """The rate for the next step, given the running estimate of the loss (nats/token).

    The reference recipe's constant one; with on_plateau='decay', below the plateau's beginning, with the square root of
    the loss.
    """
    if config.on_plateau == "none":
        return config.learning_rate
    return config.learning_rate * min(1.0, max(LOWEST, sqrt(loss / plateau_begins_at(config))))


class WeightAverage:
    """An exponential moving average of a model's weights, which full passes judge in their place.

    At a rate that still learns, each step remembers its own windows better than the others'; the mean of the last
    1 / (1 - decay) weights remembers all of them (Polyak and Juditsky, 1992).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights = list(model.parameters())
        self._mean: list[Tensor] = []  # as long as nothing has been averaged
        self._decay = decay

    @property
    def has_begun(self) -> bool:
        """Whether any weights have been averaged."""
        return bool(self._mean)

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights of now into the average."""
        if not self._mean:
            self._mean = [weight.detach().clone() for weight in self._weights]
        torch._foreach_lerp_(self._mean, self._weights, 1 - self._decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Give the model the average and keep its weights in the average's place; again to undo it."""
        for weight, mean in zip(self._weights, self._mean, strict=False):  # nothing, when nothing was averaged
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)
