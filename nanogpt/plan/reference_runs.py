"""The runs that are on record, and how many steps they let one expect of another.

steps = steps_on_record(plan.config, plan.dataset.floor)        # (low, high), or why nobody knows
runs = comparable_runs(plan.config, plan.dataset.floor)       # whose losses an ETA is read off

benchmarks/record_reference_runs.py writes the record, assets/reference_runs.json.
"""

from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import as_file, files
from math import log

import numpy as np

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.storage.json_file import read_json

ASSET = "reference_runs.json"
NEAR = 0.1  # by how much, relative, another target may differ and still be called the same


@dataclass(frozen=True)
class ReferenceRun:
    """A run of this program that reached its target on random phases."""

    optimizer: str
    subset_tokens: int  # tokens of the text
    context_length: int  # tokens of a window
    batch_size: int  # windows in a step
    learning_rate: float
    n_layer: int
    n_embd: int  # channels
    floor: float  # nats/token
    steps: int
    source: str  # the file that these figures are from
    curve: tuple[tuple[float, int], ...]  # (loss, step) from which on the mean loss stayed below it, losses descending

    @property
    def passes(self) -> float:
        """How often it trained on each token."""
        return self.steps * self.batch_size * self.context_length / self.subset_tokens

    def step_below(self, loss: float) -> float | None:
        """The step from which on its mean loss was below this one, nats/token; None outside its curve."""
        losses, steps = zip(*self.curve, strict=True)
        if not losses[-1] <= loss <= losses[0]:
            return None
        return float(np.interp(-log(loss), [-log(each) for each in losses], steps))


@dataclass(frozen=True)
class Record:
    """What assets/reference_runs.json holds."""

    target_loss: float  # of all the runs, nats/token
    runs: tuple[ReferenceRun, ...]


@cache
def read_record() -> Record:
    """The runs on record."""
    names = [f.name for f in fields(ReferenceRun) if f.name != "curve"]
    with as_file(files("nanogpt") / "assets" / ASSET) as path:
        content = read_json(path, of="the package's assets")
    runs = tuple(
        ReferenceRun(
            **{name: run[name] for name in names},
            curve=tuple(zip(content["losses"], run["steps_below"], strict=True)),
        )
        for run in content["runs"]
    )
    return Record(target_loss=content["target_loss"], runs=runs)


def steps_on_record(config: ResolvedConfig, floor: float) -> tuple[int, int] | str:
    """From how many to how many steps a run with this resolved config may take to its target, or why nobody knows.

    The fewest and the most passes over the text that a recorded run took, in steps of this config.
    """
    if why := unlike(config, floor):
        return why
    return _steps(min(run.passes for run in runs_on_record(config)), config), most_steps(config)


def comparable_runs(config: ResolvedConfig, floor: float) -> tuple[ReferenceRun, ...]:
    """The runs on record whose losses those of a run with this resolved config are compared with."""
    return () if unlike(config, floor) else tuple(runs_on_record(config))


def unlike(config: ResolvedConfig, floor: float) -> str:
    """Why a run with this resolved config is outside what was recorded, where nothing is known; '' where it is not."""
    if config.phase != "random" or config.init_from:
        return "no reference run has --phase=fixed or --init_from"
    if not config.ema or config.on_plateau != "decay":
        return "no reference run has --ema=0 or --on_plateau=none"
    if abs(config.target_loss / (recorded := read_record().target_loss) - 1) > NEAR:
        return f"--target_loss={config.target_loss:g} is not the {recorded:g} of the reference runs"
    alike = runs_on_record(config)
    if floor > (most := max(run.floor for run in alike)):
        return f"no reference run has an entropy floor above {most:.3f} nats/token"
    for name in ("subset_tokens", "context_length", "batch_size", "learning_rate", "n_layer", "n_embd"):
        values, value = [getattr(run, name) for run in alike], getattr(config, name)
        if not min(values) <= value <= max(values):
            return f"--{name}={value:g} is outside the {min(values):g} to {max(values):g} of the reference runs"
    # A rate may be the higher the narrower the model (AdamW's: Yang et al., "Tensor Programs V", arXiv 2203.03466).
    if config.learning_rate * config.n_embd > max(run.learning_rate * run.n_embd for run in alike):
        return (
            f"--learning_rate={config.learning_rate:g} is above that of any reference run for --n_embd={config.n_embd}"
        )
    return ""


def most_steps(config: ResolvedConfig) -> int:
    """How many steps of a resolved config make the most passes over the text that a run on record took."""
    return _steps(max(run.passes for run in runs_on_record(config)), config)


def runs_on_record(config: ResolvedConfig) -> list[ReferenceRun]:
    """Those with the optimizer of a resolved config."""
    return [run for run in read_record().runs if run.optimizer == config.optimizer]


def _steps(passes: float, config: ResolvedConfig) -> int:
    return round(passes * config.subset_tokens / (config.batch_size * config.context_length))


def steps_to_target(config: ResolvedConfig, floor: float) -> tuple[int, int] | str:
    """As steps_on_record, or a line for a person that says why there is no time to target."""
    if floor >= config.target_loss:
        return "time to target: never, as the target is not above the entropy floor"
    steps = steps_on_record(config, floor)
    return f"time to target: unknown: {steps}" if isinstance(steps, str) else steps
