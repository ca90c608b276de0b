"""What goes with an optimizer: its rate, where that falls, what the end of such a run looks like.

config = resolve_recipe(TrainConfig(recipe="fast"))         # with the recipe's optimizer and learning rate
recipe_of(config).decay_threshold(config.target_loss)       # nats/token
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

from nanogpt.config.train_config import TrainConfig

HIGHEST = 1.0  # nats/token that the decay may begin at: higher up the loss falls best at the constant rate


@dataclass(frozen=True)
class Recipe:
    """Figures that were measured with an optimizer, for all that ask what a run with it will do."""

    optimizer: Literal["adamw", "muon"]
    base_learning_rate: float
    base_width: int | None  # n_embd of the model that the rate was found on; None: the rate goes for every width
    plateau: float  # x the target: under it a constant rate hovers, undoing one window's memory with the next one's
    # x the target: what the trained loss may have been, by the age of the averaged weights that a pass judges, before
    # the pass that verifies it (docs/explanation/eta.md).
    levels: tuple[float, ...]
    orthogonalises: bool  # the blocks' matrices: needs whole ones on the device, and keeps one moment of them, not two

    def learning_rate(self, n_embd: int) -> float:
        """The constant rate for a model of this width."""
        # At one rate the singular values of what Muon orthogonalises together go with the root of the width: with this
        # one they are the same at every width.
        return self.base_learning_rate * (sqrt(self.base_width / n_embd) if self.base_width else 1.0)

    def decay_threshold(self, target_loss: float) -> float:
        """The loss, nats/token, below which the rate falls and the weights are averaged."""
        return min(HIGHEST, self.plateau * target_loss)


ADAMW = Recipe("adamw", 6e-4, None, 8.0, (0.8, 1.0, 1.25, 1.6), orthogonalises=False)
# 1.4 to 2.2 were seen, with AdamW 0.8 to 1.4: Muon's rougher steps gain more by averaging.
MUON = Recipe("muon", 1e-3, 768, 4.0, (0.9, 1.3, 1.8, 2.5), orthogonalises=True)
OF_OPTIMIZER = {"adamw": ADAMW, "muon": MUON}
OF_NAME = {"reference": ADAMW, "fast": MUON}


def recipe_of(config: TrainConfig) -> Recipe:
    """That of the optimizer which config asks for, or which its recipe names."""
    return OF_NAME[config.recipe] if config.optimizer == "auto" else OF_OPTIMIZER[config.optimizer]


def resolve_recipe(config: TrainConfig) -> TrainConfig:
    """config with what it leaves to its recipe filled in."""
    recipe = recipe_of(config)
    rate = config.learning_rate or recipe.learning_rate(config.n_embd)
    return replace(config, optimizer=recipe.optimizer, learning_rate=rate)
