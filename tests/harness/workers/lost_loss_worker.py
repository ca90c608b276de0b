"""One rank of two whose loss is infinite, then NaN, on rank 1 alone, while every gradient is finite.

torchrun --standalone --nproc_per_node=2 tests/harness/workers/lost_loss_worker.py --engine=ddp

Each writes rankR.json: the gradient norm of each of four steps, and whether it changed a weight.
"""

import json
import sys
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from nanogpt.config.cli import main, parse
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.engine import Batch, EngineOptions, build_engine
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.plan.plan import make_plan

SMALL = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--subset_tokens=100", "--context_length=16", "--dtype=fp32"]


def _add(forward, constant, idx, targets, reduction):
    """Losses that are off by a constant: their gradient is the same."""
    return forward(idx, targets, reduction=reduction) + constant


def run() -> int:
    """Train the four steps on the engine that the command line names."""
    config = parse(TrainConfig, [*SMALL, *sys.argv[1:]], program="lost_loss_worker.py", about=__doc__ or "")
    world = World.from_env()
    plan = make_plan(config, world)
    with world.process_group():
        torch.manual_seed(0)
        model = GPT(GPTConfig.from_options(config))
        idx = torch.arange(8).view(1, 8)
        batch = Batch(idx, idx + 1, step_tokens=16)
        options = EngineOptions(
            dtype="fp32", optimizer="adamw", compile=False, micro_batches=[batch], deepspeed=plan.deepspeed
        )
        engine = build_engine(config.engine, model, world, options)
        norms, states, forward = [], [deepcopy(engine.state_dict())], model.forward
        for lost in (0.0, float("inf"), float("nan"), 0.0):
            model.forward = partial(_add, forward, lost if world.rank else 0.0)
            engine.forward_backward(batch, is_last=True)
            norms.append(engine.step(1e-3).grad_norm)
            states.append(deepcopy(engine.state_dict()))
        changed = [any(not torch.equal(after[n], before[n]) for n in before) for before, after in pairwise(states)]
    Path(f"rank{world.rank}.json").write_text(json.dumps([norms, changed]))
    return 0


if __name__ == "__main__":
    main(run)
