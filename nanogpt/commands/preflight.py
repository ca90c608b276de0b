"""Can a run reach its target, does it fit, how long may it take?

python -m nanogpt preflight --ranks=8 --subset_tokens=4096
"""

from dataclasses import asdict, dataclass, fields, replace

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import option
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.hardware import free_bytes
from nanogpt.distributed.world import World
from nanogpt.plan.memory import Memory
from nanogpt.plan.plan import Plan, make_plan, memory_of_engines
from nanogpt.plan.reference_runs import runs_on_record, steps_to_target
from nanogpt.plan.step_time import step_seconds
from nanogpt.utils.format import duration, gigabytes


@dataclass(frozen=True)
class PreflightOptions(TrainConfig):
    """What `preflight` is asked: the options of train_overfit.py, and on how many ranks."""

    ranks: int = option(1, "processes that would train", "ranks", group="Preflight")


def preflight(options: PreflightOptions) -> int:
    """Print whether a run can reach its target, how long it may take, and the memory that each engine needs."""
    config, ranks = TrainConfig(**{f.name: getattr(options, f.name) for f in fields(TrainConfig)}), options.ranks
    world = World.from_env()
    if world.size > 1:
        raise ConfigError("preflight is one process: leave torchrun out and give --ranks=N")
    world = replace(world, size=ranks, local_size=ranks)
    plan = make_plan(config, world)
    starts = len(plan.dataset.windows.whole_starts())
    print(
        f"{plan.config.subset_tokens:,} tokens of {plan.config.data} in {starts:,} different windows of "
        f"{plan.config.context_length} tokens: entropy floor {plan.dataset.floor:.4f}, target "
        f"{plan.config.target_loss:g} nats/token"
    )
    for warning in plan.warnings:
        print(f"warning: {warning}")
    _tell_time(plan, world)
    free = free_bytes(world)
    print(
        f"\npeak memory of each rank at world size {ranks}, in GB; "
        f"{'how much is free here is unknown' if free is None else f'{gigabytes(free)} are free here'}\n"
    )
    print(_table(memory_of_engines(plan, world)))
    return 0


def _tell_time(plan: Plan, world: World) -> None:
    """A step, and the way to the target."""
    free = free_bytes(world)
    if free is not None and plan.memory.total > free:
        print("step time: unknown, as too little memory is free to measure it")
        return
    step_s = step_seconds(plan.config, world)
    steps = steps_to_target(plan.config, plan.dataset.floor)
    shared = ", without communication" if world.size > 1 else ""
    print(f"step time: about {step_s:.3g} s, measured on {world.device_name()} with fewer blocks{shared}")
    if isinstance(steps, str):
        print(steps)
    else:
        low, high = steps
        print(
            f"time to target: {duration(low * step_s)} to {duration(high * step_s)}, {low:,} to {high:,} steps: the "
            f"fewest and the most epochs of {len(runs_on_record(plan.config))} reference runs"
        )


def _table(engines: dict[str, Memory | str]) -> str:
    names = [*Memory.__dataclass_fields__]
    lines = [f"| engine | {' | '.join(names)} | total |", "|---" * (len(names) + 2) + "|"]
    for engine, need in engines.items():
        if isinstance(need, str):
            lines.append(f"| {engine} | {need} |")
        else:
            figures = [f"{value / 1e9:.2f}" for value in (*asdict(need).values(), need.total)]
            lines.append(f"| {engine} | {' | '.join(figures)} |")
    return "\n".join(lines)
