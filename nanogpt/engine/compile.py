"""torch.compile that falls back to the plain model where it does not work."""

import time
from typing import cast

import torch
from torch import nn

from nanogpt.config.errors import one_line
from nanogpt.distributed.world import World
from nanogpt.engine.base import Compilation, EngineOptions


def compile_model(model: nn.Module, world: World, options: EngineOptions) -> Compilation:
    """The model compiled, if options ask for it, by a forward and backward of each micro-batch's shape.

    The model itself stays as it is.
    """
    if not options.compile:
        return Compilation(model)
    started = time.perf_counter()
    compiled, failure = cast(nn.Module, torch.compile(model)), ""  # a module, of a module
    try:
        for batch in {b.idx.shape: b for b in options.micro_batches}.values():
            with world.autocast(options.dtype):
                losses = compiled(batch.idx, batch.targets, reduction="none")
            losses.sum().backward()
    except Exception as error:  # its failures have no common base: no C++ compiler, no Triton, its own bugs
        failure = f"torch.compile failed: {type(error).__name__}: {one_line(error)}"
    model.zero_grad()
    # All ranks or none: a compiled backward gives its gradients in another order, and ZeRO reduces them as they come.
    failure = next(filter(None, world.gather(failure)), "")
    return Compilation(model if failure else compiled, not failure, time.perf_counter() - started, failure)
