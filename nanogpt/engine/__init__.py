"""Engines: one interface to train through, whatever the number of processes."""

from collections.abc import Sequence

from nanogpt.engine.base import Batch, Engine
from nanogpt.engine.ddp import DDPEngine
from nanogpt.engine.single import SingleEngine
from nanogpt.model import GPT
from nanogpt.world import World

ENGINES = {engine.name: engine for engine in (SingleEngine, DDPEngine)}

__all__ = ["Batch", "Engine", "build_engine"]


def build_engine(
    name: str, model: GPT, world: World, *, dtype: str, micro_batches: Sequence[Batch], compile: bool
) -> Engine:
    """The engine called name ('single' or 'ddp') around model; the process group must be up for 'ddp'."""
    return ENGINES[name](model, world, dtype=dtype, micro_batches=micro_batches, compile=compile)
