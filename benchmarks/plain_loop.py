"""The loop that a user would write instead: transformers' GPT-2, fp32, AdamW at a constant rate, no more.

python benchmarks/plain_loop.py --out=plain.json --n_layer=4 --n_head=4 --n_embd=256 --subset_tokens=1024

It sees the windows that our runs see, and is ended by the same full pass: all positions of eight shifted grids, in
evaluation mode. A pass is made each `pass_every` steps once the running loss is near the target; its time counts.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import runs  # noqa: F401, it puts the package on the path
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt.cli import main, parse
from nanogpt.config import Options, TrainConfig, option, require_positive
from nanogpt.plan import Plan, make_plan
from nanogpt.strict_json import write_json
from nanogpt.world import World

NEAR = 2.0  # x the target, from which on passes are made


@dataclass(frozen=True)
class LoopOptions(Options):
    """What to train, as in train_overfit.py."""

    out: str = option("plain.json", "where the result goes")
    n_layer: int = option(16, "transformer blocks", "blocks")
    n_head: int = option(12, "attention heads", "heads")
    n_embd: int = option(768, "width of the residual stream", "channels")
    context_length: int = option(64, "length of a training window", "tokens")
    subset_tokens: int = option(2048, "memorise the first N tokens", "tokens")
    learning_rate: float = option(6e-4, "AdamW's")
    target_loss: float = option(0.099, "what a full pass must verify", "nats/token")
    seed: int = option(0, "seeds weights and window order")
    max_steps: int = option(2000, "give up after this many", "steps")
    pass_every: int = option(20, "from one full pass to the next, near the target", "steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_layer", "n_head", "n_embd", "context_length", "subset_tokens", "max_steps")


def loop(options: LoopOptions) -> int:
    """Train until the target is verified; 0 if it was."""
    shape = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd")}
    config = TrainConfig(
        **shape, context_length=options.context_length, subset_tokens=options.subset_tokens, seed=options.seed
    )
    plan = make_plan(config, World(rank=0, local_rank=0, size=1, device=torch.device("cpu")))
    torch.manual_seed(options.seed)
    model = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    running, verified, step = float("inf"), float("inf"), 0
    started = time.perf_counter()
    while step < options.max_steps and verified > options.target_loss:
        idx, targets = plan.windows.take(plan.windows.global_batch(step, config.batch_size))
        loss = torch.nn.functional.cross_entropy(model(idx).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        running = loss.item() if step == 1 else 0.8 * running + 0.2 * loss.item()
        if step % options.pass_every == 0 and running < NEAR * options.target_loss:
            verified = full_pass(model, plan)
    seconds = time.perf_counter() - started
    reached = verified <= options.target_loss
    write_json(Path(options.out), {"reached": reached, "steps": step, "train_s": seconds, "loss": verified})
    return 0 if reached else 3


@torch.no_grad()
def full_pass(model: GPT2LMHeadModel, plan: Plan) -> float:
    """The mean loss over the judged windows, nats/token."""
    model.eval()
    total = count = 0.0
    for starts in plan.judged.split(plan.config.batch_size):
        idx, targets = plan.windows.take(starts)
        logits = model(idx).logits.flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum").item()
        count += targets.numel()
    model.train()
    return total / count


if __name__ == "__main__":
    main(lambda: loop(parse(LoopOptions, sys.argv[1:], program="benchmarks/plain_loop.py", about=__doc__)))
