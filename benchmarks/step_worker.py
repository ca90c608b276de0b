"""One contender of step_time.py: it trains, a few steps each time that a line comes on standard input.

For each line, a number of steps, it answers with their times in seconds as a JSON list; it ends with the input.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import runs  # noqa: F401, it puts the package on the path
from contenders import gpt2, plain_steps, train_in_trainer

from nanogpt.config.cli import main, parse
from nanogpt.config.options import Options, option, require_positive
from nanogpt.config.train_config import TrainConfig
from nanogpt.data.windows import Windows
from nanogpt.distributed.world import World
from nanogpt.engine import Batch, EngineOptions, build_engine
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.monitor.profiler import by_own_time, start
from nanogpt.optim.ema import EMA
from nanogpt.plan.plan import make_plan


@dataclass(frozen=True)
class StepOptions(Options):
    """What a step is made of."""

    n_layer: int = option(16, "transformer blocks", "blocks")
    n_head: int = option(12, "attention heads", "heads")
    n_embd: int = option(768, "width of the residual stream", "channels")
    context_length: int = option(64, "length of a training window", "tokens")
    batch_size: int = option(16, "windows in a step", "windows")
    subset_tokens: int = option(2048, "of the text", "tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, *(f.name for f in fields(self)))

    @property
    def shape(self) -> dict[str, int]:
        """The model's."""
        return {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd")}


@dataclass(frozen=True)
class WorkerOptions(StepOptions):
    """What to train, and how."""

    contender: str = option("ours", f"a key of {__name__}.CONTENDERS")
    profile: str | None = option(
        None, "write here, as JSON, where the time of a turn's steps went, over the turn before"
    )


class Turns:
    """Lets a contender take its steps when it is its turn, and times them.

    profile: the file that holds the milliseconds a step of each operator, or of a GPU's kernels, in the newest turn.
    """

    def __init__(self, world: World, profile: str | None) -> None:
        self.world = world
        self._profile, self._recording = profile, None
        self._left, self._times, self._began = 0, [], 0.0
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # a trainer may print what it likes

    def wait(self) -> None:
        """Until the next step may begin. Ends the process with the input."""
        if not self._left:
            if self._times:
                self._write_profile()
                print(json.dumps(self._times), file=self._answers, flush=True)
            line = sys.stdin.readline()
            if not line:
                os._exit(0)  # out of the middle of another trainer's loop
            self._left, self._times = int(line), []
            self._recording = start(cuda=self.world.device.type == "cuda") if self._profile else None
        self._left -= 1
        self._began = time.perf_counter()

    def end_step(self) -> None:
        """The step is done once the device has done it."""
        self.world.wait_for_device()
        self._times.append(time.perf_counter() - self._began)

    def _write_profile(self) -> None:
        if self._recording:
            self._recording.stop()
            rows, _ = by_own_time(self._recording.key_averages())
            ms = {event.key: us / 1000 / len(self._times) for us, event in rows}
            Path(self._profile).write_text(json.dumps(ms))


def ours(
    options: WorkerOptions, windows: Windows, turns: Turns, *, recipe: str = "reference", compiled: bool = False
) -> None:
    """What train_overfit.py does at each step but for logging: batch, forward and backward, update, weight average.

    It waits for the update, which train_overfit.py lets a GPU make while it goes on.
    """
    world = turns.world
    config = make_plan(TrainConfig(**options.shape, recipe=recipe), world).config
    windows = windows.on(world.device)

    def batch(step: int) -> Batch:
        idx, targets = windows.take(windows.global_batch(step, options.batch_size))
        return Batch(idx, targets, targets.numel())

    with world.process_group():
        built = EngineOptions(config.dtype, config.optimizer, compile=compiled, micro_batches=[batch(0)])
        engine = build_engine("single", GPT(GPTConfig(**options.shape)), world, built)
        average = EMA(engine.local_weights(), config.ema)
        step = 0
        while True:
            turns.wait()
            loss_sum = engine.forward_backward(batch(step), is_last=True)
            loss_sum.item()
            engine.step(config.learning_rate)
            average.update()
            turns.end_step()
            step += 1


def plain_loop(options: WorkerOptions, windows: Windows, turns: Turns, *, bf16: bool = False) -> None:
    """transformers' GPT-2 and torch's AdamW as their introductions show them."""
    device = turns.world.device
    train_on = plain_steps(gpt2(options.shape, device, seed=0), bf16=bf16)
    step = 0
    while True:
        turns.wait()
        idx, targets = windows.take(windows.global_batch(step, options.batch_size))
        train_on(idx.to(device), targets.to(device))
        turns.end_step()
        step += 1


def trainer(options: WorkerOptions, windows: Windows, turns: Turns) -> None:
    """transformers' Trainer."""
    model = gpt2(options.shape, turns.world.device, seed=0)
    train_in_trainer(model, windows, options.batch_size, before_step=turns.wait, after_step=turns.end_step)


COMPILED = "ours, compiled"
CONTENDERS: dict[str, Callable[[WorkerOptions, Windows, Turns], None]] = {
    "ours": ours,
    COMPILED: lambda *known: ours(*known, compiled=True),
    "ours, fast recipe": lambda *known: ours(*known, recipe="fast"),
    "plain loop, fp32": plain_loop,
    "plain loop, bf16 autocast": lambda *known: plain_loop(*known, bf16=True),
    "transformers Trainer, fp32": trainer,
}


def work(options: WorkerOptions) -> int:
    """Train until the input ends."""
    config = TrainConfig(**options.shape, context_length=options.context_length, subset_tokens=options.subset_tokens)
    world = World.from_env()
    CONTENDERS[options.contender](options, make_plan(config, world).dataset.windows, Turns(world, options.profile))
    return 0


if __name__ == "__main__":
    main(lambda: work(parse(WorkerOptions, sys.argv[1:], program="benchmarks/step_worker.py", about=__doc__)))
