"""What a user would take instead: transformers' GPT-2, AdamW at a constant rate, in a plain loop or the Trainer.

python benchmarks/plain_loop.py --out=plain.json --loop=fp32 --n_layer=4 --n_head=4 --n_embd=256 --subset_tokens=1024

It sees the windows that our runs see, and is ended by the same full pass: all positions of eight shifted grids, in
evaluation mode and the loop's own dtype. A pass is made each `pass_every` steps once the running loss is near the
target, and at the end. Its seconds are told apart from the training's, as whoever writes such a loop makes none.

The result is written at the start and after each pass: `steps` and `train_s` are the newest pass's, 0 before the first,
and `over` says whether the loop has ended.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from parts.options import TaskOptions, run_script
from parts.plain import gpt2_of, loss_sum, plain_steps, train_in_trainer
from transformers import GPT2LMHeadModel

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import option, require_positive
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.plan.plan import Plan, make_plan
from nanogpt.storage.json_file import write_json

NEAR = 2.0  # x the target, from which on passes are made


@dataclass(frozen=True)
class LoopOptions(TaskOptions):
    """What to train, as in train_overfit.py."""

    out: str = option("plain.json", "where the result goes")
    loop: Literal["fp32", "bf16", "trainer"] = option("fp32", "a plain loop, one with bf16 autocast, or the Trainer")
    target_loss: float = option(0.099, "what a full pass must verify", "nats/token")
    seed: int = option(0, "seeds weights and window order")
    max_steps: int = option(2000, "give up after this many", "steps")
    pass_every: int = option(10, "from one full pass to the next, near the target", "steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "target_loss")
        if Path(self.out).exists():  # perhaps of hours
            raise ConfigError(f"--out={self.out} is there already")


def loop(options: LoopOptions) -> int:
    """Train until the target is verified; 0 if it was."""
    config = TrainConfig(**options.task, seed=options.seed)
    world = World.from_env()
    plan = make_plan(config, world)
    model = gpt2_of(config, world)
    bf16 = options.loop == "bf16"
    told = {key: value for key, value in asdict(options).items() if key != "out"}
    about = {"options": told, "device": world.device_name(), "torch": torch.__version__}
    run = Run(lambda: full_pass(model, plan, bf16=bf16), options, about)
    if options.loop == "trainer":
        train_in_trainer(model, plan.dataset.windows, config.batch_size, after_loss=run.is_over)
    else:
        train_on = plain_steps(model, plan.dataset.windows, batch_size=config.batch_size, bf16=bf16)
        step = 1
        while not run.is_over(step, train_on(step - 1)):
            step += 1
    return 0 if run.reached else 3


class Run:
    """When to make a full pass, and when to stop; what is known so far is written to options.out."""

    def __init__(self, judge: Callable[[], float], options: LoopOptions, about: dict[str, Any]) -> None:
        """judge: makes a full pass -> nats/token; about: what the result is of."""
        self._judge, self._options, self._about = judge, options, about
        self._running = 0.0
        self._passes: list[dict[str, float]] = []
        self._passes_s = 0.0
        self._started = time.perf_counter()
        self._write(0, over=False)

    @property
    def reached(self) -> bool:
        """Whether the newest full pass gave the target."""
        return bool(self._passes) and self._passes[-1]["loss"] <= self._options.target_loss

    def is_over(self, step: int, loss: float) -> bool:
        """After each step, with its mean loss."""
        options = self._options
        self._running = loss if step == 1 else 0.8 * self._running + 0.2 * loss
        ends = step >= options.max_steps
        if ends or (step % options.pass_every == 0 and self._running < NEAR * options.target_loss):
            started = time.perf_counter()
            loss = self._judge()
            self._passes.append({"step": step, "running_loss": self._running, "loss": loss})
            self._passes_s += time.perf_counter() - started
            self._write(step, over=ends or self.reached)
        return ends or self.reached

    def _write(self, step: int, *, over: bool) -> None:
        write_json(
            Path(self._options.out),
            {
                **self._about,
                "over": over,
                "reached": self.reached,
                "steps": step,
                "train_s": time.perf_counter() - self._started - self._passes_s,
                "passes_s": self._passes_s,
                "passes": self._passes,
                "loss": self._passes[-1]["loss"] if self._passes else None,
            },
        )


@torch.no_grad()
def full_pass(model: GPT2LMHeadModel, plan: Plan, *, bf16: bool) -> float:
    """The mean loss over the judged windows, nats/token."""
    model.eval()
    total = count = 0.0
    for starts in plan.dataset.judged.split(plan.config.batch_size):
        idx, targets = plan.dataset.windows.take(starts)
        total += loss_sum(model, idx.to(model.device), targets.to(model.device), bf16=bf16).item()
        count += targets.numel()
    model.train()
    return total / count


if __name__ == "__main__":
    run_script(__file__, __doc__, LoopOptions, loop)
