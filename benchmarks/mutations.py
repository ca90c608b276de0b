"""Which faults do the golden curves of `nanogpt accept` catch, and which do they miss?

python benchmarks/mutations.py
python benchmarks/mutations.py --table=benchmarks/results/mutations.zen5.2026-12-01.json

The fixed job is trained on three ranks, once as it is, and then with one thing wrong each time. What catches it: a
curve that leaves its band, replicas that differ, or neither. Ranks are forked from this process.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parts.options import BenchmarkOptions, run_benchmark
from parts.ranks import first_of
from torch import Tensor

from nanogpt.acceptance.stages.numerics import STEPS, Curve, build_job, departure, golden, job_config, train_step
from nanogpt.config.errors import ReplicaError
from nanogpt.config.options import option
from nanogpt.distributed.replicas import Replicas
from nanogpt.distributed.world import World
from nanogpt.engine import Batch, Engine
from nanogpt.plan.plan import Plan
from nanogpt.utils.phases import PhaseListener, Phases

RANKS, WRONG, AT = 3, 1, 10  # the rank that is wrong, and the step of what happens once
BITS = (0, 4, 8, 12, 16, 20, 22, 24, 28, 30, 31)  # of an fp32 number: fraction, from 23 on exponent, sign
PLACES = 3  # where each of them is turned over, in the largest weight and two others


@dataclass(frozen=True)
class MutationOptions(BenchmarkOptions):
    """What to train."""

    bf16_steps: int = option(10, "steps in bf16, where a CPU may emulate it", "steps")


class Once(PhaseListener):
    """Does something as a step begins."""

    def __init__(self, step: int, do: Callable[[], object]) -> None:
        self._step, self._do = step, do

    def enter(self, name: str, *, step: int | None, patient: bool) -> None:
        if name == "forward and backward" and step == self._step:
            self._do()


@dataclass
class Job:
    """The fixed job of one rank, which a mutation changes before it begins."""

    plan: Plan
    engine: Engine
    phases: Phases


def rate(job: Job, factor: float) -> None:
    """Another learning rate."""
    job.plan = replace(job.plan, config=replace(job.plan.config, learning_rate=factor * job.plan.config.learning_rate))


def drop(job: Job, *, always: bool) -> None:
    """One rank's gradient is zero, in each step or in one."""
    if job.engine.world.rank != WRONG:
        return

    def hook() -> None:
        handles = [p.register_hook(torch.zeros_like) for p in job.engine.model.parameters()]
        if not always:
            job.phases.listen(Once(AT + 1, lambda: [handle.remove() for handle in handles]))

    if always:
        hook()
    else:
        job.phases.listen(Once(AT, hook))


def divide_twice(job: Job) -> None:
    """The gradient is a mean over the ranks of what is a mean over them already. Loss and norm are told of that one."""
    given = job.engine.forward_backward

    def forward_backward(batch: Batch, *, is_last: bool) -> None:
        given(replace(batch, step_tokens=batch.step_tokens * RANKS), is_last=is_last)

    job.engine.forward_backward = forward_backward  # type: ignore[method-assign]


def order(job: Job, steps: Callable[[int], int]) -> None:
    """Each step is given the global batch of another."""
    windows = job.plan.dataset.windows
    given = windows.global_batch
    windows.global_batch = lambda step, batch_size: given(steps(step), batch_size)  # type: ignore[method-assign]


def same_rows(job: Job) -> None:
    """Every rank takes the first rank's rows: the data are not shared out."""
    job.plan.dataset.windows.global_batch = partial(_repeated, job.plan.dataset.windows.global_batch)  # type: ignore[method-assign]


def _repeated(given: Callable[[int, int], Tensor], step: int, batch_size: int) -> Tensor:
    return given(step, batch_size)[: batch_size // RANKS].repeat(RANKS)


def flip(job: Job, bit: int, place: int) -> None:
    """One bit of a weight that one rank holds."""
    if job.engine.world.rank != WRONG:
        return
    weights = sorted(job.engine.local_weights(), key=Tensor.numel, reverse=True)
    bits = weights[min(place, len(weights) - 1)].detach().view(-1).view(torch.int32)

    def turn() -> None:
        bits[len(bits) * (place + 1) // (PLACES + 2)] ^= torch.tensor(1 << bit).to(torch.int32).item()

    job.phases.listen(Once(AT, turn))


MUTATIONS: dict[str, Callable[[Job], None]] = {
    "nothing": lambda job: None,
    "learning rate 1 % up": partial(rate, factor=1.01),
    "learning rate 0.1 % up": partial(rate, factor=1.001),
    "one rank's gradient dropped, each step": partial(drop, always=True),
    f"one rank's gradient dropped, step {AT}": partial(drop, always=False),
    "gradient divided twice by the world size": divide_twice,
    f"batches of steps {AT} and {AT + 1} swapped": partial(
        order, steps=lambda step: {AT - 1: AT, AT: AT - 1}.get(step, step)
    ),
    "every step one batch late": partial(order, steps=lambda step: max(0, step - 1)),
    "every rank trains on the first rank's rows": same_rows,
}
FLIPS = {(bit, place): partial(flip, bit=bit, place=place) for bit in BITS for place in range(PLACES)}


def trained(world: World, mutate: Callable[[Job], None], engine: str, dtype: str, steps: int) -> dict[str, Any]:
    """What shows of a mutation: where the curve leaves its band, and what the comparison of replicas says."""
    config = job_config(engine=engine, dtype=dtype)
    job = Job(*build_job(config, world), Phases())
    replicas = Replicas(world, job.engine.replicas, step=0)
    mutate(job)
    figures = [train_step(job.plan, job.engine, step, job.phases) for step in range(steps)]
    losses, norms = zip(*figures, strict=True)
    said = ""
    try:
        replicas.check(steps)
    except ReplicaError as error:
        said = str(error)
    job.engine.close()
    curve = Curve(dtype=dtype, kind=world.device.type, engine=engine, losses=losses, grad_norms=norms)
    return {"engine": engine, "dtype": dtype, "steps": steps, "band": departure(curve, golden(dtype)), "replicas": said}


def all_of(world: World, bf16_steps: int) -> dict[str, Any]:
    """Every mutation, with both engines."""
    found: dict[str, Any] = {"mutations": [], "flips": []}
    for name, mutate in MUTATIONS.items():
        for engine in ("ddp", "sharded"):
            found["mutations"].append({"name": name, **trained(world, mutate, engine, "fp32", STEPS)})
        found["mutations"].append({"name": name, **trained(world, mutate, "ddp", "bf16", bf16_steps)})
        if world.is_first:
            print(f"{name}: {[each['band'] for each in found['mutations'][-3:]]}", flush=True)
    for (bit, place), mutate in FLIPS.items():
        for engine in ("ddp", "sharded"):
            found["flips"].append({"bit": bit, "place": place, **trained(world, mutate, engine, "fp32", STEPS)})
    return found


def measure(options: MutationOptions, out: Path) -> dict[str, Any]:
    """What was caught."""
    found = first_of(RANKS, all_of, options.bf16_steps)
    return {"device": World.from_env().device_name(), "torch": torch.__version__, "ranks": RANKS, **found}


def table(result: dict[str, Any]) -> str:
    """What catches each fault, and at which step."""
    bf16_steps = next(each["steps"] for each in result["mutations"] if each["dtype"] == "bf16")
    lines = [
        f"On {result['device']}, {result['ranks']} ranks, one of them wrong; {STEPS} steps in fp32, {bf16_steps} in "
        f"bf16.", "",
        "| fault | fp32, ddp | fp32, sharded | bf16, ddp |", "|---|---|---|---|",
    ]  # fmt: skip
    for name in dict.fromkeys(each["name"] for each in result["mutations"]):
        cells = [_caught(each) for each in result["mutations"] if each["name"] == name]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for low, high, what in ((0, 8, "lowest nine"), (9, 22, "higher"), (23, 31, "exponent and sign")):
        cells = []
        for engine in ("ddp", "sharded"):
            those = [e for e in result["flips"] if low <= e["bit"] <= high and e["engine"] == engine]
            by_band, by_replicas = (sum(bool(each[how]) for each in those) for how in ("band", "replicas"))
            cells.append(f"{by_band} of {len(those)} by the curve, {by_replicas} by the replicas")
        lines.append(f"| a bit of a weight, {what} ({low} to {high}) | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _caught(each: dict[str, Any]) -> str:
    if not each["band"]:
        return "replicas" if each["replicas"] else "nothing" if each["name"] == "nothing" else "**missed**"
    what, step = ("norm" if "gradient norm" in each["band"] else "loss"), each["band"].split("step ")[1].split()[0]
    return f"{what} of step {step}"


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, MutationOptions, measure, table)
