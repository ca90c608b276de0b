"""What do the comparisons of a running training cost, what do they find, and do they raise false alarms?

python benchmarks/sentinel.py
python benchmarks/sentinel.py --table=benchmarks/results/sentinel.epyc.2026-11-30.json

The first measures and writes JSON, the second prints it as the table in docs/explanation/sentinel.md. Ranks are forked
from this process. Cost: steps with and without checks take turns. Flips: a bit of what one of three ranks holds, or of
its gradient, is turned over. Clean runs differ in seed, rate, engine and recipe, and are checked every few steps.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from parts.options import BenchmarkOptions, run_benchmark
from parts.ranks import first_of
from parts.step import TrainStep
from torch import Tensor

from nanogpt.config.errors import ReplicaError
from nanogpt.config.options import option
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.replicas import Replicas
from nanogpt.distributed.world import World
from nanogpt.engine import Batch
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.monitor.sentinel import TOLERANCE, Sentinel
from nanogpt.plan.plan import make_plan
from nanogpt.training.trainer import micro_batches
from nanogpt.utils.phases import Phases

TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "subset_tokens": 100, "context_length": 16, "learning_rate": 1e-3,
    "batch_size": 6, "dtype": "fp32",
}  # fmt: skip
CLEAN_STEPS, CLEAN_EVERY = 40, 4
EVERY = 10  # steps between two checks of the runs with flips
FOUND = re.compile(r"rank (\d+) .*?(?:in \w+/|gradient of )([\w.]+),? ")


@dataclass(frozen=True)
class SentinelOptions(BenchmarkOptions):
    """What to measure, or which result to print."""

    n_layer: int = option(4, "transformer blocks of the model whose cost is measured", "blocks")
    n_head: int = option(12, "its attention heads", "heads")
    n_embd: int = option(768, "its width", "channels")
    pairs: int = option(5, "steps with and without checks", "pairs")
    flips: int = option(100, "bits to turn over, of what is held and as many of gradients", "bits")
    runs: int = option(200, "clean runs", "runs")


class Training:
    """One rank's, as the trainer has it; replicas and gradients are checked every so many steps."""

    def __init__(
        self,
        world: World,
        replicas_every: int | None,
        gradients_every: int | None,
        *,
        tiny: bool = True,
        **options: Any,
    ) -> None:
        given = {"replica_check_every": replicas_every, "gradient_check_every": gradients_every}
        plan = make_plan(TrainConfig(**options, **given), world)
        self.world, self.config, self.step = world, plan.config, 0
        model = None
        if tiny:  # the text's own tokens, numbered anew: else all time would go into 50,257 logits
            windows = plan.dataset.windows
            tokens, windows.ids = windows.ids.unique(return_inverse=True)
            torch.manual_seed(self.config.seed)
            model = GPT(replace(GPTConfig.from_options(self.config), vocab_size=len(tokens)))
        self.train_on = TrainStep(plan, world, model=model)
        self.engine, self.average = self.train_on.engine, self.train_on.average
        self.replicas = Replicas(world, self.held, step=0)
        self.sentinel = Sentinel(self.engine, self.replicas, self.config, Phases(), step=0)

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """What every rank holds whole."""
        return chain(self.engine.replicas(), self.engine.replicas_like_weights("mean", self.average.mean))

    def batch_of(self, rank: int) -> Batch:
        """Of a rank, in the step to come."""
        return micro_batches(self.config, self.train_on.windows, replace(self.world, rank=rank), self.step)[-1]

    def train_step(self) -> None:
        """Raises ReplicaError before or after the update."""
        number = self.step + 1
        with self.sentinel.listening(number):
            self.train_on.forward_backward(self.step)
        self.sentinel.check_gradient(number, self.batch_of)
        self.train_on.update(self.config.learning_rate)
        self.average.update()
        self.step = number
        self.sentinel.compare_replicas(number)


def cost(world: World, options: dict[str, Any], pairs: int) -> dict[str, list[float]]:
    """Seconds of steps without checks, of those whose gradient is checked, and of comparisons of replicas."""
    training = Training(world, None, None, tiny=False, **options)
    config = replace(training.config, gradient_check_every=1)
    checked = Sentinel(training.engine, training.replicas, config, Phases(), step=0)
    unchecked = training.sentinel
    training.train_step()  # the first allocates
    found: dict[str, list[float]] = {"step": [], "checked_step": [], "comparison": []}
    for _ in range(pairs):
        for name, training.sentinel in (("step", unchecked), ("checked_step", checked)):
            found[name].append(_seconds(world, training.train_step))
        found["comparison"].append(_seconds(world, lambda: training.replicas.check(training.step)))
    return found


def _seconds(world: World, work: Callable[[], None]) -> float:
    """Of the slowest rank."""
    world.max(0.0)  # all begin together
    return world.max(world.seconds_of(work))[0]


def flips_of_held(world: World, count: int) -> list[dict[str, Any]]:
    """What became of each bit that was turned over in a weight, moment or average of one rank, each in a new run."""
    random, found = np.random.default_rng(1), []
    for seed in range(count):
        training = Training(world, EVERY, None, **TINY, engine="ddp", seed=seed)
        for _ in range(EVERY + int(random.integers(EVERY))):
            training.train_step()
        held = list(training.held())
        rank, (name, values) = int(random.integers(world.size)), held[random.integers(len(held))]
        place, bit = int(random.integers(values.numel())), int(random.integers(32))
        if world.rank == rank:
            _turn_over(values.detach(), place, bit)
        flip = {"rank": rank, "tensor": name, "bit": bit, "found": None}
        at = training.step
        try:
            while training.step == at or training.step % EVERY:
                training.train_step()
        except ReplicaError as error:
            flip |= {"found": training.step - at} | _named(error, rank, name)
        found.append(flip)
    return found


def _named(error: ReplicaError, rank: int, tensor: str) -> dict[str, bool]:
    """Whether it names the rank alone, and first the parameter: a wrong moment's weight is soon wrong too."""
    match = FOUND.search(str(error))
    parameter = tensor.split("/")[-1]
    return {"named": bool(match and int(match[1]) == rank), "parameter_named": bool(match and match[2] == parameter)}


def flips_of_gradients(world: World, count: int) -> list[dict[str, Any]]:
    """The same in the gradient of one rank, in a step that is checked."""
    training, random, found = Training(world, None, 1, **TINY, engine="ddp"), np.random.default_rng(2), []
    names = [name for name, _ in training.engine.model.named_parameters()]
    for _ in range(count):
        rank, name = int(random.integers(world.size)), names[random.integers(len(names))]
        parameter, bit = training.engine.model.get_parameter(name), int(random.integers(32))
        place, sizes = int(random.integers(parameter.numel())), [0.0]
        flip = {"rank": rank, "tensor": name, "bit": bit}
        flip |= _in_a_step(training, rank, name, partial(_turned_over, place, bit, sizes))
        found.append(flip | {"size": world.gather(sizes[0])[rank]})
    return found


def doubled_gradients(world: World) -> list[dict[str, Any]]:
    """The same of the whole gradient of each parameter, twice as large as it is, in one step."""
    training, found = Training(world, None, 1, **TINY, engine="ddp"), []
    for number, (name, _) in enumerate(training.engine.model.named_parameters()):
        left = [1]
        rank = number % world.size
        found.append({"rank": rank, "tensor": name} | _in_a_step(training, rank, name, partial(_doubled, left)))
    return found


def _in_a_step(training: Training, rank: int, name: str, spoil: Callable[[Tensor], Tensor | None]) -> dict[str, bool]:
    """Whether it is found that a rank's gradient of a parameter is spoilt, and what is named."""
    parameter = training.engine.model.get_parameter(name)
    handle = parameter.register_hook(spoil) if training.world.rank == rank else None
    told = {"found": False}
    try:
        training.train_step()
    except ReplicaError as error:
        told |= {"found": True} | _named(error, rank, name)
        training.engine.step(0.0)  # clears it
    if handle:
        handle.remove()
    return told


def _doubled(left: list[int], gradient: Tensor) -> Tensor | None:
    """Once."""
    return 2 * gradient if left and left.pop() else None


def _turned_over(place: int, bit: int, sizes: list[float], gradient: Tensor) -> Tensor | None:
    """Once: the gradient with a bit turned over; by how much of its norm that changes it goes to sizes."""
    if sizes[0]:
        return None
    wrong = gradient.clone()
    _turn_over(wrong, place, bit)
    sizes[0] = ((wrong - gradient).norm() / gradient.norm()).item() or sys.float_info.min
    return wrong


def _turn_over(values: Tensor, place: int, bit: int) -> None:
    values.view(-1).view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32).item()


def alarms_of_clean_runs(world: World, count: int) -> list[dict[str, Any]]:
    """What the checks say of runs without a fault."""
    found = []
    for seed in range(count):
        engine, recipe = ("ddp", "sharded")[seed % 2], ("reference", "fast")[seed // 2 % 2]
        options = TINY | {"engine": engine, "recipe": recipe, "seed": seed, "learning_rate": 1e-3 * (1 + seed % 5)}
        training = Training(world, CLEAN_EVERY, CLEAN_EVERY, **options)
        try:
            for _ in range(CLEAN_STEPS):
                training.train_step()
        except ReplicaError as error:
            found.append({"seed": seed, "alarm": str(error)})
    return found


def measure(options: SentinelOptions, out: Path) -> dict[str, Any]:
    """The cost on two ranks, the flips on three, the clean runs on three."""
    shape = {"n_layer": options.n_layer, "n_head": options.n_head, "n_embd": options.n_embd, "dtype": "fp32"}
    return {
        "device": World.from_env().device_name(), "torch": torch.__version__, "shape": shape, "tiny": TINY,
        "intervals": [TrainConfig().replica_check_every, TrainConfig().gradient_check_every],
        "seconds": {e: first_of(2, cost, shape | {"engine": e}, options.pairs) for e in ("ddp", "sharded")},
        "flips": first_of(3, flips_of_held, options.flips), "every": EVERY,
        "doubled_gradients": first_of(3, doubled_gradients),
        "gradient_flips": first_of(3, flips_of_gradients, options.flips), "tolerance": TOLERANCE["fp32"],
        "runs": options.runs, "alarms": first_of(3, alarms_of_clean_runs, options.runs),
        "clean_steps": CLEAN_STEPS, "clean_every": CLEAN_EVERY, "compared": options.runs * CLEAN_STEPS // CLEAN_EVERY,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    shape, (replicas_every, gradients_every) = result["shape"], result["intervals"]
    lines = [
        f"On {result['device']}, fp32. Cost: {shape['n_layer']} layers of {shape['n_embd']} channels, 2 ranks; flips "
        f"and clean runs: a tiny model, 3 ranks:", "", "| | | |", "|---|---|---|",
    ]  # fmt: skip
    for engine, seconds in result["seconds"].items():
        step, checked, comparison = (median(seconds[name]) for name in ("step", "checked_step", "comparison"))
        costs = {"a gradient's check": (checked - step, gradients_every)}
        if engine == "ddp":  # the other compares nothing
            costs["a comparison"] = (comparison, replicas_every)
        lines.append(
            f"| cost with `{engine}`, a step of {step:.2f} s | "
            f"{', '.join(f'{name} {s:.2f} s' for name, (s, _) in costs.items())} | "
            f"{' + '.join(f'{s / step / every:.2%}' for s, every in costs.values())} of the time |"
        )
    steps = [flip["found"] for flip in result["flips"] if flip["found"]]
    after = f"after {min(steps)} to {max(steps)} steps, median {median(steps):g}, " if steps else ""
    lines.append(
        f"| bits of what `ddp` holds whole | {_found(result['flips'])} | {after}compared every {result['every']} |"
    )
    # Null: what is no longer finite.
    large = [flip for flip in result["gradient_flips"] if flip["size"] is None or flip["size"] > result["tolerance"]]
    small = [flip for flip in result["gradient_flips"] if flip not in large]
    for name, those in (("more", large), ("less", small)):
        lines.append(
            f"| bits of a gradient, {name} than {result['tolerance']:g} of its norm | {_found(those)} | in its step, "
            f"before the update |"
        )
    lines.append(
        f"| a parameter's whole gradient doubled, each parameter once | {_found(result['doubled_gradients'])} | in its "
        f"step, before the update |"
    )
    lines.append(
        f"| clean runs of {result['clean_steps']} steps, `ddp` and `sharded`, both recipes | {len(result['alarms'])} "
        f"alarms in {result['runs']} | {result['compared']:,} gradients compared, and `ddp`'s replicas half as "
        f"often |"
    )
    return "\n".join(lines)


def _found(flips: list[dict[str, Any]]) -> str:
    found = [flip for flip in flips if flip["found"]]
    rank, parameter = (sum(flip[key] for flip in found) for key in ("named", "parameter_named"))
    return f"{len(found)} of {len(flips)} found" + (f", rank named {rank}, parameter {parameter}" if found else "")


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, SentinelOptions, measure, table)
