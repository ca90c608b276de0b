"""The optimizer, and the learning rate that it is given each step."""

import torch
from torch import nn

from nanogpt.config import TrainConfig

BETAS = (0.9, 0.95)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without weight decay, its update fused into one kernel; the engine sets the learning rate each step."""
    return torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0.0, fused=True)


PLATEAU = 8.0  # x the target: under it a constant rate hovers, undoing one window's memory with the next one's
HIGHEST = 1.0  # nats/token that PLATEAU may begin at: higher up the loss falls best at the constant rate
LOWEST = 0.05  # of the constant rate


def learning_rate(config: TrainConfig, loss: float) -> float:
    """The rate for the next step, given the running estimate of the loss (nats/token).

    The reference recipe's constant one; with on_plateau='decay', in proportion to the loss once that is below PLATEAU
    times the target, or below HIGHEST.
    """
    if config.on_plateau == "none":
        return config.learning_rate
    start = min(HIGHEST, PLATEAU * config.target_loss)
    return config.learning_rate * min(1.0, max(LOWEST, loss / start))
