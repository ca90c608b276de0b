"""One contender of step_time.py: it trains, a few steps each time that a line comes on standard input.

For each line, a number of steps, it answers with their times in seconds as a JSON list; it ends with the input.
"""

from dataclasses import dataclass

from parts.contenders import CONTENDERS
from parts.options import run_script
from parts.turns import OURS, StepOptions, Turns

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import option
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World


@dataclass(frozen=True)
class WorkerOptions(StepOptions):
    """What to train, and how."""

    contender: str = option(OURS, "a key of parts/contenders.py's CONTENDERS")
    profile: str | None = option(
        None, "write here, as JSON, where the time of a turn's steps went, over the turn before"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contender not in CONTENDERS:
            raise ConfigError(f"--contender={self.contender} must be one of {'; '.join(CONTENDERS)}")


def work(options: WorkerOptions) -> int:
    """Train until the input ends."""
    CONTENDERS[options.contender](TrainConfig(**options.step), Turns(World.from_env(), options.profile))
    return 0


if __name__ == "__main__":
    run_script(__file__, __doc__, WorkerOptions, work)
