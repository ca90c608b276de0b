"""The runs that are on record, and how many steps they let one expect of another.

steps = steps_on_record(plan.config, plan.dataset.floor)        # (low, high), or why nobody knows
"""

from typing import NamedTuple

from nanogpt.config.train_config import TrainConfig


class Recorded(NamedTuple):
    """A run of this program that reached its target on random phases."""

    optimizer: str
    subset_tokens: int
    context_length: int
    batch_size: int
    learning_rate: float
    n_layer: int
    n_embd: int
    floor: float
    steps: int

    @property
    def passes(self) -> float:
        """How often it trained on each token."""
        return self.steps * self.batch_size * self.context_length / self.subset_tokens


# Those of benchmarks/curves/ that trained as the program does, with --phase=random and the target 0.099; and
# docs/memorising.md's default run with AdamW.
RECORDED = (
    Recorded("adamw", 1024, 64, 8, 6e-4, 6, 256, 0.028775, 172),
    Recorded("adamw", 768, 32, 16, 1e-3, 2, 96, 0.05443, 246),
    Recorded("adamw", 768, 64, 2, 2e-3, 2, 64, 0.026631, 668),
    Recorded("adamw", 512, 32, 16, 7e-4, 2, 64, 0.047753, 464),
    Recorded("adamw", 512, 32, 16, 3e-3, 2, 64, 0.047753, 174),
    Recorded("adamw", 2048, 128, 8, 1.5e-3, 2, 128, 0.017772, 233),
    Recorded("adamw", 1024, 64, 8, 1e-3, 3, 128, 0.028775, 235),
    Recorded("adamw", 1024, 64, 8, 6e-4, 4, 192, 0.028775, 213),
    Recorded("adamw", 2048, 64, 16, 6e-4, 16, 768, 0.036102, 367),
    Recorded("muon", 2048, 64, 16, 0.0014142135623730952, 4, 384, 0.036102, 96),
    Recorded("muon", 1024, 32, 16, 0.0017320508075688772, 4, 256, 0.057551, 95),
    Recorded("muon", 1024, 64, 8, 0.0017320508075688772, 6, 256, 0.028775, 106),
    Recorded("muon", 768, 64, 2, 0.0034641016151377543, 2, 64, 0.026631, 792),
    Recorded("muon", 2048, 128, 8, 0.002449489742783178, 2, 128, 0.017772, 216),
    Recorded("muon", 768, 32, 16, 0.0028284271247461905, 2, 96, 0.05443, 178),
    Recorded("muon", 512, 32, 16, 0.0034641016151377543, 2, 64, 0.047753, 184),
    Recorded("muon", 1024, 64, 8, 0.002449489742783178, 3, 128, 0.028775, 165),
    Recorded("muon", 1024, 64, 8, 0.002, 4, 192, 0.028775, 122),
    Recorded("muon", 2048, 64, 16, 0.001, 16, 768, 0.036102, 114),
)
RECORDED_TARGET = 0.099
NEAR = 0.1  # by how much, relative, another target may differ and still be called the same


def steps_on_record(config: TrainConfig, floor: float) -> tuple[int, int] | str:
    """From how many to how many steps a run with this resolved config may take to its target, or why nobody knows.

    The fewest and the most passes over the text that a recorded run took, in steps of this config. Only within what
    was recorded: of another optimizer setting, longer text or lower target nothing is known.
    """
    if config.phase != "random" or config.init_from:
        return "no run on a fixed grid, or begun with trained weights, is on record"
    if not config.ema:
        return "no run with --ema=0, without averaged weights, is among those that this is read off"
    if abs(config.target_loss / RECORDED_TARGET - 1) > NEAR:
        return f"--target_loss={config.target_loss:g} is not the {RECORDED_TARGET:g} of the runs on record"
    alike = runs_on_record(config)
    if floor > (most := max(run.floor for run in alike)):
        return f"no run on record had a floor above {most:.3f}"
    for name in ("subset_tokens", "context_length", "batch_size", "learning_rate", "n_layer", "n_embd"):
        values, value = [getattr(run, name) for run in alike], getattr(config, name)
        if not min(values) <= value <= max(values):
            return f"--{name}={value:g} is outside the {min(values):g} to {max(values):g} of the runs on record"
    # A rate may be the higher the narrower the model (AdamW's: Yang et al., "Tensor Programs V", arXiv 2203.03466).
    if config.learning_rate * config.n_embd > max(run.learning_rate * run.n_embd for run in alike):
        return f"--learning_rate={config.learning_rate:g} is hotter than any on record for --n_embd={config.n_embd}"
    return _steps(min(run.passes for run in alike), config), most_steps(config)


def most_steps(config: TrainConfig) -> int:
    """How many steps of a resolved config make the most passes over the text that a run on record took."""
    return _steps(max(run.passes for run in runs_on_record(config)), config)


def runs_on_record(config: TrainConfig) -> list[Recorded]:
    """Those with the optimizer of a resolved config."""
    return [run for run in RECORDED if run.optimizer == config.optimizer]


def _steps(passes: float, config: TrainConfig) -> int:
    return round(passes * config.subset_tokens / (config.batch_size * config.context_length))


def steps_to_target(config: TrainConfig, floor: float) -> tuple[int, int] | str:
    """As steps_on_record, or a line for a person that says why there is no time to target."""
    if floor >= config.target_loss:
        return "time to target: never"
    steps = steps_on_record(config, floor)
    return f"time to target: unknown: {steps}" if isinstance(steps, str) else steps
