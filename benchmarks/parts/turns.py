"""Contenders that take turns of a few steps: each a process of its own, the others standing still meanwhile.

    with ExitStack() as stack:
        process = Contender(OURS, as_words(options.step), stack)
        seconds = process.take(2)

The other end of the pipe, in benchmarks/step_worker.py, is a Turns: for each line on its standard input, a number of
steps, it answers with their times in seconds as a JSON list, and it ends with the input.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch

from nanogpt.config.options import option
from nanogpt.distributed.world import World
from nanogpt.monitor.profiler import by_own_time, start
from nanogpt.storage.provenance import installed_version
from parts import REPOSITORY
from parts.options import TaskOptions

OURS, COMPILED, FAST = "ours", "ours, compiled", "ours, fast recipe"
PLAIN, AUTOCAST = "plain loop, fp32", "plain loop, bf16 autocast"
TRAINER = "transformers Trainer, fp32"


@dataclass(frozen=True)
class StepOptions(TaskOptions):
    """What a step is made of."""

    batch_size: int = option(16, "windows in a step", "windows")

    @property
    def step(self) -> dict[str, int]:
        """All of it, by the names of the options."""
        return {f.name: getattr(self, f.name) for f in fields(StepOptions)}


class Contender:
    """A process that trains when it is told to."""

    def __init__(self, name: str, words: list[str], stack: ExitStack) -> None:
        worker = [sys.executable, REPOSITORY / "benchmarks" / "step_worker.py", f"--contender={name}", *words]
        self.name = name
        self._process = stack.enter_context(
            subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(self._process.kill)

    def take(self, steps: int) -> list[float]:
        """Seconds of each of as many steps, taken now."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed")
        return json.loads(line)


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

    def take(self, train_on: Callable[[int], object]) -> None:
        """Train on step 0, 1, 2, ..., each when it may begin, until the input ends."""
        for step in count():
            self.wait()
            train_on(step)
            self.end_step()

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


def circumstances(options: StepOptions, world: World) -> dict[str, Any]:
    """What a step's time depends on."""
    return {
        "options": options.step,
        "device": world.device_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: installed_version(name) for name in ("torch", "transformers", "accelerate")},
    }


def describe_circumstances(result: dict[str, Any]) -> str:
    """The circumstances of a result, in words."""
    shape, versions = result["options"], result["versions"]
    return (
        f"{shape['n_layer']} layers of {shape['n_embd']} channels, {shape['batch_size']} x {shape['context_length']} "
        f"tokens a step, {result['device']}, {result['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )
