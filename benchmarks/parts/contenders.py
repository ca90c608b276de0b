"""The contenders of step_time.py: ours, and what a user would take instead.

Each runs in a process of its own, and ours in one that has not imported transformers.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.plan.plan import make_plan
from parts.step import TrainStep
from parts.turns import AUTOCAST, COMPILED, FAST, OURS, PLAIN, TRAINER, Turns


def train_ours(config: TrainConfig, turns: Turns, *, compiled: bool = False) -> None:
    """Our engine, with the average of the weights."""
    plan = make_plan(config, turns.world)
    with turns.world.process_group():
        step = TrainStep(plan, turns.world, compiled=compiled)

        def train_on(number: int) -> None:
            step(number, plan.config.learning_rate)
            step.average.update()

        turns.take(train_on)


def train_plainly(config: TrainConfig, turns: Turns, *, bf16: bool = False) -> None:
    """transformers' GPT-2 and torch's AdamW as their introductions show them."""
    from parts import plain

    plain.train_plainly(config, turns, bf16=bf16)


def train_by_trainer(config: TrainConfig, turns: Turns) -> None:
    """transformers' Trainer."""
    from parts import plain

    plain.train_by_trainer(config, turns)


CONTENDERS: dict[str, Callable[[TrainConfig, Turns], None]] = {
    OURS: train_ours,
    COMPILED: lambda *known: train_ours(*known, compiled=True),
    FAST: lambda config, turns: train_ours(replace(config, recipe="fast"), turns),
    PLAIN: train_plainly,
    AUTOCAST: lambda *known: train_plainly(*known, bf16=True),
    TRAINER: train_by_trainer,
}


def contenders_here(world: World) -> list[str]:
    """Those that this machine can run, and that are worth it."""
    left_out = set() if find_spec("accelerate") else {TRAINER}
    if world.device.type == "cpu":
        left_out.add(COMPILED)  # half a minute for nothing: benchmarks/LOG.md
    return [name for name in CONTENDERS if name not in left_out]
