"""The learning rate of each step: a recipe's constant one, lower where the loss comes near the target.

learning_rate(config, loss=0.3)
"""

from dataclasses import replace
from math import sqrt

from nanogpt.config.train_config import TrainConfig

OPTIMIZERS = {"reference": "adamw", "fast": "muon"}


ADAMW_LR, MUON_LR = 6e-4, 1e-3


MUON_WIDTH = 768  # of the model that MUON_LR was found on


def resolve_recipe(config: TrainConfig) -> TrainConfig:
    """config with what it leaves to its recipe filled in."""
    optimizer = OPTIMIZERS[config.recipe] if config.optimizer == "auto" else config.optimizer
    # At one rate the singular values of what Muon orthogonalises together go with the root of the width: with this one
    # they are the same at every width.
    rate = ADAMW_LR if optimizer == "adamw" else MUON_LR * sqrt(MUON_WIDTH / config.n_embd)
    return replace(config, optimizer=optimizer, learning_rate=config.learning_rate or rate)


# x the target: under it a constant rate hovers, undoing one window's memory with the next one's
PLATEAU = {"adamw": 8.0, "muon": 4.0}


HIGHEST = 1.0  # nats/token that the plateau may begin at: higher up the loss falls best at the constant rate


LOWEST = 0.05  # of the constant rate


def decay_threshold(config: TrainConfig) -> float:
    """The loss, nats/token, below which the rate falls and the weights are averaged."""
    return min(HIGHEST, PLATEAU[config.optimizer] * config.target_loss)


def learning_rate(config: TrainConfig, loss: float) -> float:
    """The rate for the next step, given the running estimate of the loss (nats/token).

    Constant; with on_plateau='decay', below the plateau's beginning, with the square root of the loss.
    """
    if config.on_plateau == "none":
        return config.learning_rate
    share = min(1.0, max(LOWEST, sqrt(loss / decay_threshold(config))))
    return config.learning_rate * share
