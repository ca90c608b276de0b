"""What the parts of a run share, and how far it has come: what a checkpoint holds of it beside the tensors.

state = TrainState.of(config, judged_windows=130, launched_at=time.perf_counter())
state.load_state_dict(checkpoint.progress, ranks=world.size)
"""

import time
from dataclasses import dataclass, field
from math import log, nan
from pathlib import Path
from typing import Any

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.distributed.world import World
from nanogpt.evaluate.eval_schedule import HOVERS, EvalSchedule
from nanogpt.evaluate.evaluation import Evaluation
from nanogpt.monitor.eta import Circumstances, Eta, NoEta, steps_to_target
from nanogpt.monitor.loggers import Logger
from nanogpt.monitor.meters import Meter
from nanogpt.optim.recipe import ADAMW, recipe_of
from nanogpt.plan.plan import Plan
from nanogpt.plan.reference_runs import ReferenceRun
from nanogpt.storage.run_lock import Fence
from nanogpt.utils.phases import Phases
from nanogpt.utils.signals import StopSignals

# Of the judged average: what its first weights may still be, which remember less (docs/explanation/fast-recipe.md).
RIPE = 0.25


@dataclass(frozen=True)
class RunContext:
    """What stays as it is during an attempt, on one rank."""

    plan: Plan
    world: World
    out_dir: Path
    logger: Logger
    phases: Phases  # where whoever does something says so
    stop: StopSignals
    fence: Fence  # to be checked before each write


@dataclass
class TrainState:
    """Counters, sums and clocks; the same on every rank but for the clocks."""

    schedule: EvalSchedule
    launched_at: float  # time.perf_counter() when the process began; earlier by what the run took before a resume
    started_at: float = field(default_factory=time.perf_counter)  # likewise, when training began
    step: int = 0
    step_is_unfinished: bool = False  # trained, but its full pass and its row are still to come
    bad_steps: int = 0  # non-finite ones, never applied
    bad_steps_in_a_row: int = 0
    full_pass_s: float = 0.0
    other_device_s: float = 0.0  # train_s x ranks lacks these, as earlier attempts had another number of ranks
    awaits_recall: bool = False  # the newest full pass of a run with a target_recall found the loss
    missed: tuple[int, ...] = ()  # the windows that it missed, as its Evaluation has them
    verified: Evaluation | None = None  # the full pass that reached the targets: only files and scores are to come
    lr: float = nan  # of the newest step, as is
    grad_norm: float = nan
    meter: Meter = field(default_factory=Meter)
    history: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss) of each logged row

    @classmethod
    def of(cls, config: ResolvedConfig, *, judged_windows: int, launched_at: float) -> "TrainState":
        """The beginning of a run whose full passes read so many windows."""
        below = recipe_of(config).decay_threshold(config.target_loss) if config.ema else 0.0
        # A target so high that passes may come before there is an average is not worth the wait for one.
        ripe_steps = 1 + log(RIPE) / log(config.ema) if HOVERS * config.target_loss < below else 0.0
        schedule = EvalSchedule(
            config.target_loss, judged_windows, config.batch_size, averages_below=below, ripe_steps=ripe_steps
        )
        return cls(schedule, launched_at)

    @property
    def train_s(self) -> float:
        """Seconds since training began, over all attempts, without the time between them.

        Of an attempt that was killed, what came after its last checkpoint is not in it: the steps are done again.
        """
        return time.perf_counter() - self.started_at

    @property
    def launch_s(self) -> float:
        """Seconds since the process began, over all attempts, without the time between them."""
        return time.perf_counter() - self.launched_at

    def eta(
        self,
        config: ResolvedConfig,
        *,
        floor: float,
        windows_per_epoch: int,
        references: tuple[ReferenceRun, ...] = (),
    ) -> Eta | NoEta:
        """When the run will end. floor: nats/token; references: finished runs that it may be like."""
        schedule = self.schedule
        to_begin = schedule.ripe_steps > 0 and not schedule.averaging
        recipe = recipe_of(config)
        known = Circumstances(
            floor=floor,
            epoch_steps=windows_per_epoch / config.batch_size,
            slows_below=recipe.decay_threshold(config.target_loss) if config.on_plateau == "decay" else 0.0,
            levels=(recipe if config.ema else ADAMW).levels,
            lag_steps=config.ema / (1 - config.ema),  # the mean age of an average's weights
            wait_steps=schedule.wait_steps,
            averages_below=schedule.averages_below if to_begin else 0.0,
            ripe_steps=schedule.ripe_steps,
            judged_step=self.step - schedule.unjudged_steps,
            n_embd=config.n_embd,
            references=references,
        )
        return steps_to_target(self.history, config.target_loss, known)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON once figures that are not finite are null."""
        verified = self.verified
        return {name: getattr(self, name) for name in _AS_THEY_ARE} | {
            "awaits_recall": self.awaits_recall,
            "missed": self.missed,
            "verified_loss": verified and verified.loss,
            "verified_recall": verified and verified.recall,
            "verified_by_heart": verified is not None and verified.by_heart,
            "train_s": self.train_s,
            "launch_s": self.launch_s,
            "meter": self.meter.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, ranks: int) -> None:
        """Go on, on as many ranks, from state_dict() and the world_size that a checkpoint holds beside it."""
        for name in _AS_THEY_ARE:
            setattr(self, name, state[name])
        self.awaits_recall = state.get("awaits_recall", False)  # older checkpoints know no recall
        self.missed = tuple(state.get("missed", ()))
        if (loss := state["verified_loss"]) is not None:
            self.verified = Evaluation(loss, state.get("verified_recall"), state.get("verified_by_heart", False))
        self.lr, self.grad_norm = (nan if figure is None else figure for figure in (self.lr, self.grad_norm))
        self.history = [(step, loss) for step, loss in self.history]
        self.started_at -= state["train_s"]
        self.launched_at -= state["launch_s"]
        self.other_device_s += state["train_s"] * (state["world_size"] - ranks)
        self.meter.load_state_dict(state["meter"])
        self.schedule.load_state_dict(state["schedule"])


_AS_THEY_ARE = (
    "step", "step_is_unfinished", "bad_steps", "bad_steps_in_a_row", "full_pass_s", "other_device_s",
    "lr", "grad_norm", "history",
)  # fmt: skip
