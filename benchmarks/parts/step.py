"""One training step of ours, as the benchmarks take it.

step = TrainStep(plan, world)
loss = step(0, learning_rate=6e-4)
step.average.update()

step.forward_backward(1)        # the same in two halves, for those who look at the gradients between them
loss = step.update(learning_rate=6e-4)
"""

from dataclasses import dataclass

import torch

from nanogpt.distributed.world import World
from nanogpt.engine import EngineOptions, build_engine
from nanogpt.model.fp8 import fp8_linear
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.optim.ema import EMA
from nanogpt.plan.plan import Plan
from nanogpt.training.trainer import micro_batches


class TrainStep:
    """What train_overfit.py does at each step of a rank: batches, forwards and backwards, update.

    It logs nothing, and lets a GPU make the update while the host goes on, as train_overfit.py does. What is done after
    it, the average of the weights, is the caller's: average.update().
    """

    def __init__(
        self, plan: Plan, world: World, *, model: GPT | None = None, compiled: bool = False, graphs: bool = True
    ) -> None:
        """In plan's engine, in world's process group.

        model: to train; None: a new one, its weights seeded by plan's. graphs: whether a GPU may launch the step as a
        few graphs. They keep the optimizer as it is now.
        """
        config = self._config = plan.config
        self.windows = plan.dataset.windows.on(world.device)
        if model is None:
            torch.manual_seed(config.seed)
            model = GPT(GPTConfig.from_options(config))
        if config.head_dtype == "fp8":
            model.lm_head.training_product = fp8_linear
        batches = micro_batches(config, self.windows, world, step=0)
        built = EngineOptions(
            config.dtype, config.optimizer, compile=compiled, micro_batches=batches, cuda_graphs=graphs
        )
        self.engine = build_engine(config.engine, model, world, built)
        self.average = EMA(self.engine.local_weights(), config.ema)

    def __call__(self, step: int, learning_rate: float) -> float:
        """Train on the step's global batch -> its mean loss, nats/token."""
        self.forward_backward(step)
        return self.update(learning_rate)

    def forward_backward(self, step: int) -> None:
        """Gradients of this rank's micro-batches of the step."""
        batches = micro_batches(self._config, self.windows, self.engine.world, step)
        for batch in batches:
            self.engine.forward_backward(batch, is_last=batch is batches[-1])

    def update(self, learning_rate: float) -> float:
        """Of the weights, by these gradients -> the global batch's mean loss, nats/token."""
        step_tokens = self._config.batch_size * self._config.context_length
        return self.engine.step(learning_rate).loss_sum / step_tokens


@dataclass(frozen=True)
class CollectingWorld(World):
    """A world of one that makes the collectives of a step nevertheless, on its process group of one."""

    @property
    def collects(self) -> bool:
        return True
