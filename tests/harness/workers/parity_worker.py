"""One rank of the parity matrix: trains each cell that it is given for some steps, in one process group.

torchrun --standalone --nproc_per_node=2 tests/harness/workers/parity_worker.py CELLS.json CURVES.json
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import nanogpt.distributed.buckets
import nanogpt.optim.muon
from nanogpt.config.cli import main
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.engine import Engine, build_engine
from nanogpt.engine.base import EngineOptions
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.plan.plan import Plan, make_plan
from nanogpt.training.trainer import micro_batches

nanogpt.distributed.buckets.CHUNK_BYTES = 4_000  # so that this model too is cut into many
nanogpt.optim.muon.CHANNELS = 16  # half of what the cells' matrices have: else none would be taken in groups


def small_engine(config: TrainConfig, world: World) -> tuple[Plan, Engine]:
    """The plan of config and its engine, around a model whose vocabulary is the text's own."""
    plan = make_plan(config, world)
    config, windows = plan.config, plan.dataset.windows
    # The text's own tokens, numbered anew: where bf16 is emulated, 50,257 logits a position would take half an hour.
    tokens, windows.ids = windows.ids.unique(return_inverse=True)
    shape = replace(GPTConfig.from_options(config), vocab_size=len(tokens))
    torch.manual_seed(config.seed)
    options = EngineOptions(
        config.dtype, config.optimizer, compile=False, micro_batches=micro_batches(config, windows, world, 0),
        deepspeed=plan.deepspeed,
        gradient_compression=config.gradient_compression,
    )  # fmt: skip
    return plan, build_engine(config.engine, GPT(shape), world, options)


def train_step(plan: Plan, engine: Engine, step: int) -> tuple[float, float]:
    """One update -> (mean loss over all ranks, gradient norm)."""
    config, world = plan.config, engine.world
    batches = micro_batches(config, plan.dataset.windows, world, step)
    for batch in batches:
        engine.forward_backward(batch, is_last=batch is batches[-1])
    result = engine.step(config.learning_rate)
    return result.loss_sum / batches[0].step_tokens, result.grad_norm


def curve(config: TrainConfig, world: World) -> list[tuple[float, float]]:
    """train_step's figures of each of config.max_steps steps."""
    plan, engine = small_engine(config, world)
    gathered_for_good = [name for name, p in engine.model.named_parameters() if getattr(p, "ds_persist", False)]
    assert not gathered_for_good, "ZeRO 3 would share nothing out"
    return [train_step(plan, engine, step) for step in range(config.max_steps)]


def work_on_cells(work: Callable[[dict, World], Any]) -> int:
    """work(cell, world) of each cell of the file that the first word names, in one process group, to the second."""
    world = World.from_env()
    with world.process_group(even_alone=True):
        found = [work(cell, world) for cell in json.loads(Path(sys.argv[1]).read_text())]
    if world.is_first:
        Path(sys.argv[2]).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    main(lambda: work_on_cells(lambda cell, world: curve(TrainConfig(**cell), world)))
