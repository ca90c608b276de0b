"""A step on a GPU as two CUDA graphs, gradient and update, instead of some thousand kernels.

A step of 16 x 64 tokens keeps a GPU busy for less time than Python takes to launch its kernels one by one
(docs/reference/performance.md), and several ranks wait for the slowest Python of all. The host waits once a step, for
the sums between the graphs, when both are launched: so it prepares the next step while the GPU makes the update.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from nanogpt.config.errors import one_line
from nanogpt.distributed.world import World
from nanogpt.engine.base import Batch, EngineOptions
from nanogpt.engine.sharded import ShardedEngine
from nanogpt.engine.single import SingleEngine
from nanogpt.model.gpt import GPT
from nanogpt.optim.optimizer import make_capturable
from nanogpt.utils.console import say

Result = TypeVar("Result")


class Replay(Generic[Result]):
    """Work that launches the same kernels on the same memory each time: once as it is, from then on as a graph.

    The first time lets everything allocate that stays, and ranks connect. A result of tensors is overwritten by the
    next call. Where a rank cannot capture the work, all go on as the first time. Every rank must call.
    """

    def __init__(
        self,
        work: Callable[[], Result],
        world: World,
        stream: torch.cuda.Stream,
        parameters: Iterable[nn.Parameter] = (),
    ) -> None:
        """stream: to run and to capture on, never the default one. Autograd remembers where it ran.

        parameters: whose gradients the work makes or clears.
        """
        self._work, self._world, self._stream = work, world, stream
        self._parameters = list(parameters)
        self._has_run = False
        self._has_failed = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Result:
        if self._has_run and not self._has_failed and self._graph is None:
            self._capture()
        self._has_run = True
        if self._graph is None:
            return self._aside()
        self._graph.replay()
        return self._result

    @property
    def is_graph(self) -> bool:
        """Whether the next call replays."""
        return self._graph is not None

    @property
    def has_failed(self) -> bool:
        """Whether the work cannot be captured."""
        return self._has_failed

    def give_up(self) -> None:
        """Go on as the first time."""
        self._has_failed, self._graph = True, None

    def _capture(self) -> None:
        """Record the work, and run nothing."""
        graph, failure = torch.cuda.CUDAGraph(), ""
        gradients = [parameter.grad for parameter in self._parameters]
        try:
            # Of this thread alone: NCCL's and a checkpoint's wait for events of theirs, and pin memory, meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._work()
        except Exception as error:  # of whatever type: each library has its own for what a capture refuses
            failure = f"{type(error).__name__}: {one_line(error)}"
        failure = next(filter(None, self._world.gather(failure)), "")  # all ranks or none
        self._has_failed = bool(failure)
        if not failure:
            self._graph = graph
            return
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient  # what was recorded has not been computed, nor what is gone been used
        if self._world.is_first:
            say(f"warning: no CUDA graph can be captured ({failure}); going on kernel by kernel, which is slower")

    def _aside(self) -> Result:
        here = torch.cuda.current_stream(self._world.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # it will be, next
            result = self._work()
        here.wait_stream(self._stream)
        return result


class CudaGraphEngine(SingleEngine):
    """As SingleEngine, for steps of one micro-batch that all have the shape of the first."""

    @staticmethod
    def can_train(world: World, options: EngineOptions) -> bool:
        """Whether every rank can capture a step; CUDA_LAUNCH_BLOCKING, which finds a faulty kernel, forbids it."""
        allowed = options.cuda_graphs and os.environ.get("CUDA_LAUNCH_BLOCKING") != "1"
        return all(world.gather(world.device.type == "cuda" and len(options.micro_batches) == 1 and allowed))

    def __init__(self, model: GPT, world: World, options: EngineOptions) -> None:
        super().__init__(model, world, options)
        self.is_heard = False
        make_capturable(self.optimizer, world.device)
        (first,) = options.micro_batches
        self._batch = Batch(first.idx.clone(), first.targets.clone(), first.step_tokens)
        self._figures = self._sums = world.on_device()  # where the graphs read and write, from the first step on
        stream = torch.cuda.Stream(world.device)
        parameters = list(self.model.parameters())
        self._gradient_graph = Replay(self._gradient, world, stream, parameters)
        self._update_graph = Replay(self._update_of_sums, world, stream, parameters)

    @property
    def cuda_graphs(self) -> bool:  # type: ignore[override]  # read-only there too
        return self._gradient_graph.is_graph

    def forward_backward(self, batch: Batch, *, is_last: bool) -> None:
        self._batch.idx.copy_(batch.idx)
        self._batch.targets.copy_(batch.targets)

    def forward_s(self) -> float | None:
        return None if self.cuda_graphs else super().forward_s()

    def close(self) -> None:
        self._gradient_graph.give_up()
        self._update_graph.give_up()

    def _sum_up(self, figures: Tensor) -> Tensor:
        if self._figures.shape != figures.shape:
            self._figures = torch.empty_like(figures)
        self._figures.copy_(figures)
        self._sums = self._gradient_graph()
        return self._sums

    def _update(self, sums: Tensor) -> None:
        if self._gradient_graph.has_failed:  # what it makes is elsewhere each time
            self._update_graph.give_up()
        self._update_graph()
        if self._update_graph.has_failed:  # it has cleared the gradients that a graph would go on writing to
            self._gradient_graph.give_up()

    def _gradient(self) -> Tensor:
        self.losses.forget()  # of a capture that failed
        super().forward_backward(self._batch, is_last=True)
        return super()._sum_up(self._figures)

    def _update_of_sums(self) -> None:
        super()._update(self._sums)


class ShardedCudaGraphEngine(CudaGraphEngine, ShardedEngine):
    """The same of the sharded engine, whose collectives are in the graphs."""
