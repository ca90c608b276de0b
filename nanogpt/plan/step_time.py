"""How long a training step takes on this device, timed before a run begins.

step_s = step_seconds(plan.config, world)
"""

import os
from dataclasses import replace

import torch

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.distributed.world import World
from nanogpt.engine import Batch, EngineOptions, build_engine
from nanogpt.model.gpt import GPT, GPTConfig

LAYERS = 2  # of the models that are timed
REPEATS = 3  # of each timed part, of which the fastest counts


def step_seconds(config: ResolvedConfig, world: World) -> float:
    """A training step's time on one of world.size ranks that share the batch, with a resolved config, in seconds.

    Timed are the embedding and head alone and with a block or two, forward, backward and update of the single engine;
    the rest is that many blocks more. Neither communication nor what torch.compile saves is in it. Ranks on a CPU are
    timed on one thread each, as torchrun starts them, and take turns where there are more of them than cores.
    """
    alone = World(rank=0, local_rank=0, size=1, device=world.device)
    threads, turns = torch.get_num_threads(), 1.0
    if world.device.type == "cpu" and world.size > 1:
        torch.set_num_threads(1)
        turns = max(1.0, world.size / (os.cpu_count() or 1))
    share = -(-config.batch_size // world.size)
    micro_batches = -(-share // config.micro_batch_size)
    layers = min(LAYERS, config.n_layer)
    with alone.process_group():
        graphed = config.engine == ("single" if world.size == 1 else "sharded") and micro_batches == 1
        without = _timed(config, 0, alone, graphed=graphed)
        with_some = _timed(config, layers, alone, graphed=graphed)
    torch.set_num_threads(threads)
    pass_s, update_s = (
        none_s + config.n_layer * max(0.0, some_s - none_s) / layers
        for none_s, some_s in zip(without, with_some, strict=True)
    )
    return turns * (micro_batches * pass_s + update_s)


def _timed(config: ResolvedConfig, n_layer: int, world: World, *, graphed: bool) -> tuple[float, float]:
    """Of a model of n_layer blocks: seconds of forward and backward of a micro-batch, and of an update.

    graphed: as a run whose rank has one micro-batch makes them on a GPU; the update's seconds are then all of a step's.
    """
    model = GPT(replace(GPTConfig.from_options(config), n_layer=n_layer))
    window = torch.randint(model.config.vocab_size, (config.micro_batch_size, config.context_length + 1))
    idx, targets = (part.to(world.device) for part in (window[:, :-1], window[:, 1:]))
    batch = Batch(idx, targets, targets.numel())
    options = EngineOptions(config.dtype, config.optimizer, compile=False, micro_batches=[batch] if graphed else [])
    engine = build_engine("single", model, world, options)
    passes = [world.seconds_of(lambda: engine.forward_backward(batch, is_last=True)) for _ in range(REPEATS + 1)]
    updates = []
    for _ in range(REPEATS + 2 * graphed):  # the first two are launched kernel by kernel, and recorded
        engine.forward_backward(batch, is_last=True)
        updates.append(world.seconds_of(lambda: engine.step(config.learning_rate)))
    return min(passes[1:]), min(updates)
