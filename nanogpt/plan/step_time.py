"""How long a run may take, before it begins: a step timed on this device, the steps of runs that are on record.

step_s = step_seconds(plan.config, world)
logger.say(describe_expected_time(plan.config, plan.dataset.floor, peak_flops_per_s=peak, device_type="cpu"))
"""

import os
from dataclasses import replace

import torch

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.distributed.world import World
from nanogpt.engine import Batch, EngineOptions, build_engine
from nanogpt.model.gpt import GPT, GPTConfig, flops_per_token
from nanogpt.plan.reference_runs import steps_to_target
from nanogpt.utils.format import duration

LAYERS = 2  # of the models that are timed
REPEATS = 3  # of each timed part, of which the fastest counts


def describe_expected_time(
    config: ResolvedConfig, floor: float, *, peak_flops_per_s: float | None, device_type: str
) -> str:
    """What a run can say at its start without timing anything: a step's least time, and steps to the target.

    The least is that of the step's matrix products at the peak of all ranks, nothing else counted. On a CPU a step
    takes some 1.2 times as long, so that it tells something of the time to the target; on a GPU 2 to 10 times
    (benchmarks/LOG.md).
    """
    parts = []
    least_s = None
    if peak_flops_per_s:
        tokens = config.batch_size * config.context_length
        flops = flops_per_token(GPTConfig.from_options(config), context_length=config.context_length) * tokens
        least_s = flops / peak_flops_per_s
        parts.append(f"a step takes {least_s:.2g} s at least, for its matrix products alone")
    steps = steps_to_target(config, floor)
    if isinstance(steps, str):
        parts.append(steps)
    else:
        low, high = steps
        parts.append(f"to the target {low:,} to {high:,} steps by the runs on record")
        if least_s and device_type == "cpu":
            parts[-1] += f", {duration(low * least_s)} to {duration(high * least_s)} at that pace"
    return "; ".join(parts)


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
        graphed = world.size == 1 and config.engine == "single" and micro_batches == 1
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

    graphed: as a run of one micro-batch on one GPU makes them.
    """
    model = GPT(replace(GPTConfig.from_options(config), n_layer=n_layer))
    window = torch.randint(model.config.vocab_size, (config.micro_batch_size, config.context_length + 1))
    idx, targets = (part.to(world.device) for part in (window[:, :-1], window[:, 1:]))
    batch = Batch(idx, targets, targets.numel())
    options = EngineOptions(config.dtype, config.optimizer, compile=False, micro_batches=[batch] if graphed else [])
    engine = build_engine("single", model, world, options)
    passes = [world.seconds_of(lambda: engine.forward_backward(batch, is_last=True)) for _ in range(REPEATS + 1)]
    updates = []
    for _ in range(REPEATS):
        engine.forward_backward(batch, is_last=True)
        updates.append(world.seconds_of(lambda: engine.step(config.learning_rate)))
    return min(passes[1:]), min(updates)
