"""Engines: one interface to train through, whatever the number of processes and however the state is shared out."""

from nanogpt.distributed.world import World
from nanogpt.engine.base import Batch, Engine, EngineOptions
from nanogpt.engine.cuda_graph import CudaGraphEngine, ShardedCudaGraphEngine
from nanogpt.engine.ddp import DDPEngine
from nanogpt.engine.deepspeed import DeepSpeedEngine
from nanogpt.engine.sharded import ShardedEngine
from nanogpt.engine.single import SingleEngine
from nanogpt.model.gpt import GPT

ENGINES = {engine.name: engine for engine in (SingleEngine, DDPEngine, ShardedEngine, DeepSpeedEngine)}
GRAPHED = {engine.name: engine for engine in (CudaGraphEngine, ShardedCudaGraphEngine)}

__all__ = ["Batch", "Engine", "EngineOptions", "build_engine"]


def build_engine(name: str, model: GPT, world: World, options: EngineOptions) -> Engine:
    """The engine called name (a key of ENGINES) around model; the process group that it needs must be up."""
    engines = GRAPHED if name in GRAPHED and CudaGraphEngine.can_train(world, options) else ENGINES
    return engines[name](model, world, options)
