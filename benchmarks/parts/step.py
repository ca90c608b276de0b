"""One training step of ours, as the benchmarks take it.

step = TrainStep(plan, world)
loss = step(0, learning_rate=6e-4)
step.average.update()
"""

from dataclasses import dataclass

import torch

from nanogpt.distributed.world import World
from nanogpt.engine import Batch, EngineOptions, build_engine
from nanogpt.model.fp8 import fp8_linear
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.optim.ema import EMA
from nanogpt.plan.plan import Plan


class TrainStep:
    """What train_overfit.py does at each step of one process: batch, forward and backward, update.

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
        config = plan.config
        self.windows = plan.dataset.windows.on(world.device)
        self._batch_size = config.batch_size
        if model is None:
            torch.manual_seed(config.seed)
            model = GPT(GPTConfig.from_options(config))
        if config.head_dtype == "fp8":
            model.lm_head.training_product = fp8_linear
        built = EngineOptions(
            config.dtype, config.optimizer, compile=compiled, micro_batches=[self._batch(0)], cuda_graphs=graphs
        )
        self.engine = build_engine(config.engine, model, world, built)
        self.average = EMA(self.engine.local_weights(), config.ema)

    def __call__(self, step: int, learning_rate: float) -> float:
        """Train on the step's global batch -> its mean loss, nats/token."""
        batch = self._batch(step)
        self.engine.forward_backward(batch, is_last=True)
        return self.engine.step(learning_rate).loss_sum / batch.step_tokens

    def _batch(self, step: int) -> Batch:
        idx, targets = self.windows.take(self.windows.global_batch(step, self._batch_size))
        return Batch(idx, targets, targets.numel())


@dataclass(frozen=True)
class CollectingWorld(World):
    """A world of one that makes the collectives of a step nevertheless, on its process group of one."""

    @property
    def collects(self) -> bool:
        return True
