"""The learning rate of each step: a recipe's constant one, lower where the loss comes near the target.

learning_rate(config, loss=0.3)
"""

from math import sqrt

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.optim.recipe import recipe_of

LOWEST = 0.05  # of the constant rate


def learning_rate(config: ResolvedConfig, loss: float) -> float:
    """The rate for the next step, given the running estimate of the loss (nats/token).

    Constant; with on_plateau='decay', below the recipe's threshold, with the square root of the loss.
    """
    if config.on_plateau == "none":
        return config.learning_rate
    threshold = recipe_of(config).decay_threshold(config.target_loss)
    return config.learning_rate * min(1.0, max(LOWEST, sqrt(loss / threshold)))
