"""One process, one device: the engine that every other is compared with."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from nanogpt.distributed.hardware import Stopwatch
from nanogpt.distributed.snapshot import HostCopy
from nanogpt.distributed.world import World
from nanogpt.engine.base import Batch, Compilation, Engine, EngineOptions, StepLosses, StepResult
from nanogpt.engine.compile import compile_model
from nanogpt.model.gpt import GPT
from nanogpt.optim.optimizer import (
    MOMENTS,
    build_optimizer,
    gradient_norm,
    refuse_update,
    restored_state,
    set_learning_rate,
)
from nanogpt.storage.checkpoint import CheckpointReader, Piece


class SingleEngine(Engine):
    """fp32 weights and optimizer state, computing in dtype."""

    name = "single"

    def __init__(self, model: GPT, world: World, options: EngineOptions) -> None:
        self.world = world
        self.dtype = options.dtype
        self.model = model.to(world.device)
        self.optimizer = build_optimizer(self.model, world, name=options.optimizer, dtype=options.dtype)
        self.compilation = self._compile(options)
        self.forward, self.is_heard = self.compilation.forward, not self.compilation.compiled
        self.losses = StepLosses()
        self._loss_sum = torch.zeros((), device=world.device)  # of this rank's rows in the step
        self._forward_watch = Stopwatch(world.device)
        self._summing_s = 0.0  # the newest step's figures, over the ranks
        self.host_refuses = world.device.type != "cuda"  # a norm that is not finite; a GPU does, and is not waited for

    def forward_backward(self, batch: Batch, *, is_last: bool) -> None:
        with self.world.autocast(self.dtype), self._forward_watch:
            losses: Tensor = self.forward(batch.idx, batch.targets, reduction="none")
        loss_sum = losses.sum()
        mean_share(loss_sum, batch, self._gradient_scale()).backward()
        self._loss_sum += loss_sum.detach()
        self.losses.add(losses)

    def loss_apart(self, batch: Batch) -> Tensor:
        with self.world.autocast(self.dtype):
            loss_sum: Tensor = self.model(batch.idx, batch.targets)
        return mean_share(loss_sum, batch, self._gradient_scale())

    def step(self, lr: float, *figures: float) -> StepResult:
        set_learning_rate(self.optimizer, lr)
        sums = self._sum_up(self.world.on_device(*figures))
        self.losses.end_step()
        read = HostCopy(sums)
        self._update(sums)
        grad_norm, loss_sum, *summed = read.tolist()  # the one time that the host waits for the device
        return StepResult(loss_sum, grad_norm, tuple(summed))

    def _sum_up(self, figures: Tensor) -> Tensor:
        """The step's gradient norm, loss sum and figures over all ranks, (2 + figures,), on the device."""
        sums = self._all_reduce(torch.cat([self._loss_sum.to(figures.dtype)[None], figures]))
        return torch.cat([gradient_norm(self.model).to(sums.dtype)[None], sums])

    def _all_reduce(self, values: Tensor) -> Tensor:
        started = time.perf_counter()
        self.world.sum_tensor(values)
        self._summing_s = time.perf_counter() - started  # a CPU has waited for the others, a GPU for nobody
        return values

    def _update(self, sums: Tensor) -> None:
        """Of the weights, if the norm in sums is finite; then the step is cleared."""
        if not self.host_refuses:
            refuse_update(self.optimizer, ~sums[0].isfinite())
        if not self.host_refuses or sums[0].isfinite():
            self.optimizer.step()
        self._clear_gradient()
        self._loss_sum.zero_()

    def _clear_gradient(self) -> None:
        self.optimizer.zero_grad()

    def exposed_communication_s(self) -> float | None:
        return 0.0

    def forward_s(self) -> float | None:
        return self._forward_watch.seconds()

    def pieces(self) -> Iterator[Piece]:
        return replicated_pieces(self, self.optimizer)

    def restore(self, checkpoint: CheckpointReader, *, updates: int) -> None:
        restore_replicated(self, self.optimizer, checkpoint, updates)

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        return replicated(self, self.optimizer)

    def _compile(self, options: EngineOptions) -> Compilation:
        return compile_model(self.model, self.world, options)

    def _gradient_scale(self) -> float:
        return 1.0


def replicated(engine: Engine, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Weights and moments that every rank holds whole."""
    for kind, tensors in _weights_and_moments(engine, optimizer):
        yield from engine.replicas_like_weights(kind, tensors)


def replicated_pieces(engine: Engine, optimizer: Optimizer) -> Iterator[Piece]:
    """This rank's share of them."""
    for kind, tensors in _weights_and_moments(engine, optimizer):
        yield from engine.pieces_like_weights(kind, tensors)


def _weights_and_moments(engine: Engine, optimizer: Optimizer) -> Iterator[tuple[str, Sequence[Tensor | None]]]:
    weights = engine.local_weights()
    yield "weight", weights
    for moment in MOMENTS if optimizer.state else ():
        yield moment, [optimizer.state[weight].get(moment) for weight in weights]


def restore_replicated(engine: Engine, optimizer: Optimizer, checkpoint: CheckpointReader, updates: int) -> None:
    """Weights and moments that every rank holds whole."""
    weights = engine.local_weights()
    engine.read_like_weights("weight", weights, checkpoint)
    if updates:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                optimizer.state[weight] = restored_state(weight, updates, group)
        for moment in MOMENTS:
            engine.read_like_weights(moment, [optimizer.state[weight].get(moment) for weight in weights], checkpoint)


def mean_share(loss_sum: Tensor, batch: Batch, scale: float) -> Tensor:
    """What to call backward on: this batch's share of the global mean loss, times scale; NaN for a non-finite loss."""
    # 0 when the loss is finite, NaN when it is not: a lost loss then shows in every rank's gradient norm.
    poison = loss_sum.detach() * 0
    return loss_sum * (scale / batch.step_tokens + poison)
