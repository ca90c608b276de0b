"""The single engine on a GPU, its step launched as two CUDA graphs instead of some thousand kernels.

A step of 16 x 64 tokens keeps a GPU busy for less time than Python takes to launch its kernels one by one
(docs/reference/performance.md).
"""

import os
import warnings
from collections.abc import Callable
from math import isfinite
from typing import Generic, TypeVar

import torch
from torch import Tensor

from nanogpt.distributed.world import World
from nanogpt.engine.base import Batch, EngineOptions
from nanogpt.engine.single import SingleEngine
from nanogpt.model.gpt import GPT
from nanogpt.optim.optimizer import gradient_norm, make_capturable, set_learning_rate

Result = TypeVar("Result")


class Replay(Generic[Result]):
    """Work that launches the same kernels on the same memory each time: once as it is, from then on as a graph.

    The first time lets everything allocate that stays. A result of tensors is overwritten by the next call.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._has_run = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Result:
        if not self._has_run:
            self._has_run = True
            return self._aside()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, and runs nothing
                self._result = self._work()
            self._graph = graph
        self._graph.replay()
        return self._result

    def _aside(self) -> Result:
        """On a stream aside: autograd remembers where it ran, and a capture must not wait for the default stream."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # it will be, next
            result = self._work()
        here.wait_stream(aside)
        return result


class CudaGraphEngine(SingleEngine):
    """As SingleEngine, for steps of one micro-batch that all have the shape of the first."""

    cuda_graphs = True

    @staticmethod
    def can_train(world: World, options: EngineOptions) -> bool:
        """Whether a step can be captured; with CUDA_LAUNCH_BLOCKING, by which a faulty kernel is found, none can."""
        blocking = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        return world.device.type == "cuda" and len(options.micro_batches) == 1 and not blocking

    def __init__(self, model: GPT, world: World, options: EngineOptions) -> None:
        super().__init__(model, world, options)
        make_capturable(self.optimizer, world.device)
        (first,) = options.micro_batches
        self._batch = Batch(first.idx.clone(), first.targets.clone(), first.step_tokens)
        self._forward_backward = Replay(self._gradient)
        self._update = Replay(self.optimizer.step)

    def forward_backward(self, batch: Batch, *, is_last: bool) -> Tensor:
        self._batch.idx.copy_(batch.idx)
        self._batch.targets.copy_(batch.targets)
        loss_sum, self._norm = self._forward_backward()
        return loss_sum

    def step(self, lr: float) -> float:
        norm = self._norm.item()
        if isfinite(norm):
            set_learning_rate(self.optimizer, lr)
            self._update()
        return norm

    def _gradient(self) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()  # the graph's own gradients are written over, not added to
        loss_sum = super().forward_backward(self._batch, is_last=True)
        return loss_sum, gradient_norm(self.model)
