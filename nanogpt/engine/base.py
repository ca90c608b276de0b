"""What the training loop knows of an engine, and all it knows."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.distributed.world import World
from nanogpt.model.gpt import GPT
from nanogpt.storage.checkpoint import CheckpointReader, Piece
from nanogpt.storage.report import ScoresPrecision


@dataclass(frozen=True)
class Batch:
    """Rows of one step that one rank holds at once."""

    idx: Tensor  # (rows, T)
    targets: Tensor  # (rows, T)
    step_tokens: int  # targets in the whole global batch that these rows belong to


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to compute."""

    dtype: str  # 'bf16' or 'fp32'
    optimizer: str  # 'adamw' or 'muon'
    compile: bool
    micro_batches: Sequence[Batch]  # one step's worth, whose shapes a compiled model is warmed up with
    deepspeed: Mapping[str, Any] | None = None  # DeepSpeed's configuration, for the engine that wants one
    gradient_compression: str = "none"  # or 'bf16': what gradients are sent in
    cuda_graphs: bool = True  # whether a step may be launched as graphs, which call no hook


@dataclass(frozen=True)
class Compilation:
    """What came of compiling a model."""

    forward: nn.Module  # what to call: the model itself, or a compiled one that shares its parameters
    compiled: bool = False
    seconds: float = 0.0
    failure: str = ""  # why it is not compiled although that was asked


class StepLosses:
    """Cross-entropies of one rank's tokens: of the step that is under way, and of the newest one."""

    def __init__(self) -> None:
        self._under_way: list[Tensor] = []
        self._newest: list[Tensor] = []

    def add(self, losses: Tensor) -> None:
        """Those of a micro-batch, (rows, T)."""
        self._under_way.append(losses.detach())

    def end_step(self) -> None:
        """The step is over. Where a graph made it, which calls nobody, it has overwritten those of the step before."""
        if self._under_way:
            self._newest, self._under_way = self._under_way, []

    def forget(self) -> None:
        """Those added belong to no step."""
        self._under_way.clear()

    def newest(self) -> Tensor:
        """A copy of the newest step's, (rows, T), nats, in the order of its micro-batches."""
        return torch.cat(self._newest)


@dataclass(frozen=True)
class StepResult:
    """What a step tells every rank."""

    loss_sum: float  # over the rows of all ranks, nats
    grad_norm: float  # L2, over all parameters and ranks
    figures: tuple[float, ...]  # what the ranks gave to the step, summed


class Engine(ABC):
    """One rank's model, optimizer and gradients.

    A step is one or more forward_backward, the last of them with is_last, and then step.
    """

    name: str
    world: World
    model: GPT  # never the wrapper: full passes, recitation and saving go through this
    compilation: Compilation  # of the training forward
    losses: StepLosses  # of this rank's rows, each at the weights of its own step
    cuda_graphs: bool = False  # whether a step is launched as a few graphs instead of kernel by kernel
    # The best that model computes in with the weights of state_dict.
    scores_precision: ScoresPrecision = ScoresPrecision.FP32
    can_compute_apart: bool = True  # whether there is a loss_apart
    is_heard: bool = True  # whether hooks on the parameters hear a step's gradients, and those are loss_apart's
    gathers_weights: bool = False  # anew in each update, which overwrites what a rank held wrongly of others' parts

    @abstractmethod
    def forward_backward(self, batch: Batch, *, is_last: bool) -> None:
        """Add the batch's gradient and loss sum to the step's.

        The gradient is that of the mean loss over the global batch: each rank divides by step_tokens, whatever its own
        share of the rows. A non-finite loss makes the whole gradient non-finite, so that every rank refuses the step.
        """

    @abstractmethod
    def step(self, lr: float, *figures: float) -> StepResult:
        """Update the weights at learning rate lr, and clear the gradient.

        With a non-finite norm nothing is updated. figures: of this rank; their sums travel with the loss's, before the
        update, and are read with it, so that the host waits once a step. A GPU may still be at the update then.
        """

    @abstractmethod
    def loss_apart(self, batch: Batch) -> Tensor:
        """What forward_backward would call backward on, not compiled, for a gradient that is no part of a step.

        To be differentiated by torch.autograd.grad, which leaves gradients and the exchange of them alone.
        """

    def close(self) -> None:  # noqa: B027, most engines have nothing to do
        """No step follows: let go of what the process group must outlive."""

    def exposed_communication_s(self) -> float | None:
        """Seconds that the newest step's backward waited for other ranks; None: this engine cannot tell."""
        return None

    def forward_s(self) -> float | None:
        """Seconds of a part of the newest step's last forward in which no rank waits for another, for engines that
        cannot tell their exposed communication; None: nobody can tell that either.
        """
        return None

    def local_weights(self) -> list[Tensor]:
        """The tensors that hold this rank's weights, whole or in part, always in the same order.

        Whoever writes to them calls weights_written afterwards, on every rank, and has put the old values back before
        the next step.
        """
        return list(self.model.parameters())

    def weights_written(self) -> None:  # noqa: B027, most engines have nothing to do
        """Let the model see what was written to local_weights."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """This rank's share of a checkpoint: fp32 weights and what the optimizer remembers,
        as 'weight/NAME', 'exp_avg/NAME', ...

        All ranks' pieces together are the whole state, each value once, whatever the engine.
        """

    @abstractmethod
    def restore(self, checkpoint: CheckpointReader, *, updates: int) -> None:
        """Go on from what pieces() of some engine wrote after as many updates. Raises CheckpointError."""

    def pieces_like_weights(self, kind: str, tensors: Sequence[Tensor | None]) -> Iterator[Piece]:
        """This rank's share of tensors that are laid out as local_weights is, as 'KIND/NAME'; None: there is none."""
        for (name, _), tensor in zip(self.model.named_parameters(), tensors, strict=True):
            if tensor is None:
                continue
            share = self.world.rows(tensor.numel())
            if share.start < share.stop:
                yield Piece(f"{kind}/{name}", share.start, tensor.reshape(-1)[share])

    def read_like_weights(self, kind: str, tensors: Sequence[Tensor | None], checkpoint: CheckpointReader) -> None:
        """Fill tensors that are laid out as local_weights is from what pieces_like_weights wrote.

        Every rank must call it: each reads its part of a tensor, and they exchange the parts.
        """
        for (name, _), tensor in zip(self.model.named_parameters(), tensors, strict=True):
            if tensor is not None:
                self.world.fill(tensor.detach().view(-1), partial(checkpoint.read, f"{kind}/{name}"))

    @abstractmethod
    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of what every rank holds whole, and must hold alike. Every rank must go through all of it."""

    def replicas_like_weights(self, kind: str, tensors: Sequence[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """The same of tensors that are laid out as local_weights is, as 'KIND/NAME'."""
        for (name, _), tensor in zip(self.model.named_parameters(), tensors, strict=True):
            if tensor is not None:
                yield f"{kind}/{name}", tensor

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of every parameter, whole, the tied one once. Every rank must go through all of it.

        A tensor may be gone when the next one comes.
        """
        return ((name, parameter.detach()) for name, parameter in self.model.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter, whole, in fp32, on the CPU, the tied one once: on the first rank. Every rank must call."""
        return {name: weight.to("cpu", torch.float32) for name, weight in self.weights()}
