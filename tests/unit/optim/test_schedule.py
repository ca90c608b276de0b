"""The learning rate falls with the loss, and by the optimizer."""

import pytest

from nanogpt.config.train_config import TrainConfig
from nanogpt.optim.recipe import resolve_recipe
from nanogpt.optim.schedule import learning_rate


@pytest.mark.parametrize(
    ("loss", "share"),
    [(float("inf"), 1), (5.0, 1), (0.792, 1), (0.198, 0.5), (0.099, 0.125**0.5), (1e-6, 0.05), (0.0, 0.05)],
)
def test_the_rate_falls_with_the_square_root_of_the_loss(loss, share):
    """Reference: 0.792 = 8 x 0.099 is where the plateau begins; 5 % of the rate is the least."""
    assert learning_rate(resolve_recipe(TrainConfig()), loss) == pytest.approx(6e-4 * share)
    assert learning_rate(resolve_recipe(TrainConfig(on_plateau="none")), loss) == 6e-4


def test_muons_plateau_begins_later():
    """Reference: 0.396 = 4 x 0.099; half the rate at a quarter of that."""
    config = resolve_recipe(TrainConfig(recipe="fast"))
    assert learning_rate(config, 0.396) == 1e-3
    assert learning_rate(config, 0.099) == pytest.approx(1e-3 / 2)


def test_muons_rate_goes_with_the_width():
    """Reference: with the root of 768 over the channels; AdamW's does not, nor one that is given."""
    assert resolve_recipe(TrainConfig(recipe="fast", n_embd=192)).learning_rate == 2e-3
    assert resolve_recipe(TrainConfig(recipe="fast", n_embd=192, learning_rate=0.1)).learning_rate == 0.1
    assert resolve_recipe(TrainConfig(n_embd=192)).learning_rate == 6e-4


def test_the_rate_is_the_optimizers():
    """Invariant: a recipe with the other one's optimizer has the other one's rate."""
    assert resolve_recipe(TrainConfig(recipe="fast", optimizer="adamw")).learning_rate == 6e-4
    assert resolve_recipe(TrainConfig(optimizer="muon")).learning_rate == 1e-3


def test_a_high_target_does_not_lower_the_rate_early():
    """Invariant: with a target of 3 the rate is constant down to a loss of 1."""
    assert learning_rate(resolve_recipe(TrainConfig(target_loss=3.0)), 1.01) == 6e-4
