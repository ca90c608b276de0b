"""What a recipe leaves in memory: loss and exact recall of the averaged weights, step after step.

python benchmarks/recipe_trace.py --recipe=fast --positions_rate=8e-3
python benchmarks/recipe_trace.py --table=benchmarks/results/recipe_trace.epyc.2026-11-28.json

The first trains in one process and adds a trace to the result, this day's or --out's; the second prints all of them as
a Markdown table. No full pass ends a trace, so that recipes can be compared at the same loss and at the same step. All
figures are of the windows that full passes judge, 249 of the default text; a window counts as recalled if its second
half comes back without a mistake after its first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from parts.options import BenchmarkOptions, TaskOptions, run_benchmark, task_option
from parts.step import TrainStep

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import option, require_positive
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.evaluate.recall import Forward, read
from nanogpt.model.generate import second_half
from nanogpt.optim.muon import ADAMW_RATE, MULTIPLE, POSITIONS_RATE, channels_together
from nanogpt.optim.schedule import learning_rate
from nanogpt.plan.plan import Plan, make_plan
from nanogpt.storage.json_file import find_json
from nanogpt.training.state import TrainState

REMEMBERED = 0.99  # of the windows


@dataclass(frozen=True)
class TraceOptions(TaskOptions, BenchmarkOptions):
    """What to trace, or which result to print."""

    recipe: Literal["reference", "fast"] = option("fast", "as train_overfit.py's")
    learning_rate: float | None = option(None, "as train_overfit.py's")
    ema: float = option(TrainConfig.ema, "as train_overfit.py's")
    positions_rate: float | None = option(None, "AdamW's for the learned positions beside Muon; none: the recipe's")
    rest_rate: float | None = option(None, "AdamW's for all else beside Muon; none: the recipe's")
    channels: int | None = option(None, "orthogonalised together by Muon; none: the recipe's", "channels")
    seed: int = option(0, "as train_overfit.py's")
    dtype: Literal["auto", "bf16", "fp32"] = option("auto", "as train_overfit.py's")
    n_layer: int = task_option("n_layer", 6)
    n_head: int = task_option("n_head", 4)
    n_embd: int = task_option("n_embd", 256)
    steps: int = option(120, "length of the trace", "steps")
    from_step: int = option(60, "read the memory first after this step", "steps")
    every: int = option(6, "and again after as many", "steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "learning_rate", "positions_rate", "rest_rate", "channels")
        if self.recipe == "reference" and (self.positions_rate or self.rest_rate or self.channels):
            raise ConfigError("--positions_rate, --rest_rate, --channels: beside Muon alone, with --recipe=fast")
        if self.channels and self.n_embd % self.channels:
            raise ConfigError(f"--channels={self.channels} must divide --n_embd={self.n_embd}")


def measure(options: TraceOptions, out: Path) -> dict[str, Any]:
    """One trace, added to the others."""
    same = ("recipe", "learning_rate", "ema", "seed", "dtype", *options.task)
    world = World.from_env()
    plan = make_plan(TrainConfig(engine="single", **{name: getattr(options, name) for name in same}), world)
    result = find_json(out) or {"traces": []}
    muon: dict[str, float] = {}
    if plan.config.optimizer == "muon":
        muon["channels"] = options.channels or channels_together(options.n_embd)
        muon["positions_rate"] = options.positions_rate or POSITIONS_RATE * plan.config.learning_rate
        muon["rest_rate"] = options.rest_rate or ADAMW_RATE * plan.config.learning_rate
    told = {name: getattr(plan.config, name) for name in (*same, "target_loss")} | muon
    told |= {"device": world.device_name(), "torch": version("torch")}
    with world.process_group():
        rows = list(_rows(plan, world, options, muon))
    result["traces"].append(told | {"rows": rows})
    return result


def _rows(plan: Plan, world: World, options: TraceOptions, muon: dict[str, float]) -> Iterator[dict[str, float]]:
    config = plan.config
    train_on = TrainStep(plan, world, graphs=False)
    if config.optimizer == "muon":
        optimizer = train_on.engine.optimizer
        rest, positions, _ = optimizer.param_groups
        rest[MULTIPLE] = muon["rest_rate"] / config.learning_rate
        positions[MULTIPLE] = muon["positions_rate"] / config.learning_rate
        optimizer.channels = muon["channels"]
    schedule = TrainState.of(config, judged_windows=len(plan.dataset.judged), launched_at=0.0).schedule
    forward = Forward(world, config.dtype, config.batch_size)
    recited = second_half(config.context_length)
    reads = range(options.from_step, options.steps + 1, options.every)
    for step in range(options.steps):
        schedule.observe(train_on(step, learning_rate(config, schedule.estimate)))
        if schedule.averaging:
            train_on.average.update()
        if step + 1 in reads:
            with train_on.average.applied():
                reading = read(train_on.engine.model, train_on.windows, plan.dataset.judged, forward)
            yield {
                "step": step + 1,
                "train_loss": schedule.estimate,
                "full_pass_loss": reading.loss,
                "second_half_loss": reading.nll[:, recited].mean().item(),
                "exact_recall": reading.right[:, recited].all(dim=1).float().mean().item(),
            }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        "| model | recipe | seed | Muon's rate | channels together | AdamW's: positions | the rest | first read below "
        f"the target: step, loss, exact recall | {REMEMBERED:.0%} recall from step | "
        "last read: step, loss, exact recall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trace in result["traces"]:
        rows, rate = trace["rows"], trace["learning_rate"]
        there = next((row for row in rows if row["full_pass_loss"] <= trace["target_loss"]), None)
        short = [row["step"] for row in rows if row["exact_recall"] < REMEMBERED]
        kept = [row["step"] for row in rows if not short or row["step"] > short[-1]]
        muon = f"{rate:.2g} | {trace['channels']}" if "channels" in trace else "- | -"
        positions, rest = (trace.get(name, rate) for name in ("positions_rate", "rest_rate"))
        lines.append(
            f"| {trace['n_layer']} x {trace['n_embd']} | {trace['recipe']} | {trace['seed']} | "
            f"{muon} | {positions:.2g} | {rest:.2g} | {_at(there)} | "
            f"{kept[0] if kept else 'not yet'} | {_at(rows[-1])} |"
        )
    return "\n".join(lines)


def _at(row: dict[str, Any] | None) -> str:
    return f"{row['step']}, {row['full_pass_loss']:.3f}, {row['exact_recall']:.1%}" if row else "none"


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, TraceOptions, measure, table)
