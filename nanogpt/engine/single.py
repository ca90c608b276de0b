"""One process, one device: the engine that every other is compared with."""

import time
import warnings
from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from nanogpt.engine.base import Batch, Engine
from nanogpt.model import GPT
from nanogpt.optim import build_optimizer
from nanogpt.world import World


class SingleEngine(Engine):
    """fp32 weights and optimizer state, computing in dtype."""

    name = "single"

    def __init__(self, model: GPT, world: World, *, dtype: str, micro_batches: Sequence[Batch], compile: bool) -> None:
        """micro_batches: one step's worth, whose shapes a compiled model is warmed up with."""
        self.world = world
        self.dtype = dtype
        self.model = model.to(world.device)
        self.optimizer = build_optimizer(self.model)
        self.compiled, self.compile_s = False, 0.0
        self.forward: nn.Module = self.model
        if compile:
            self.forward = self._compile(micro_batches)

    def forward_backward(self, batch: Batch, *, is_last: bool) -> Tensor:
        with self.world.autocast(self.dtype):
            loss_sum = self.forward(batch.idx, batch.targets)
        # 0 when the loss is finite, NaN when it is not: a lost loss then shows in every rank's gradient norm.
        poison = loss_sum.detach() * 0
        (loss_sum * (self._gradient_scale() / batch.step_tokens + poison)).backward()
        return loss_sum.detach()

    def step(self, lr: float) -> float:
        norm = get_total_norm([p.grad for p in self.model.parameters()]).item()  # waits for the device
        if isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _gradient_scale(self) -> float:
        return 1.0

    def _compile(self, micro_batches: Sequence[Batch]) -> nn.Module:
        """The compiled model, after a forward and backward of each shape, or the plain one if that fails."""
        started = time.perf_counter()
        compiled = torch.compile(self.model)
        try:
            for batch in {b.idx.shape: b for b in micro_batches}.values():
                with self.world.autocast(self.dtype):
                    compiled(batch.idx, batch.targets).backward()
            self.compiled = True
        except Exception as error:  # its failures have no common base: no C++ compiler, no Triton, its own bugs
            if self.world.is_first:
                reason = next(iter(str(error).strip().splitlines()), "")
                warnings.warn(f"torch.compile failed, going on without: {type(error).__name__}: {reason}", stacklevel=2)
            compiled = self.model
        self.optimizer.zero_grad()
        self.compile_s = time.perf_counter() - started
        return compiled
