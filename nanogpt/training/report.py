"""How a run ends: its report, and the status of its process."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanogpt.config.errors import RunError
from nanogpt.data.windows import subset_and_windows
from nanogpt.distributed.world import World
from nanogpt.engine import Engine
from nanogpt.plan.plan import Plan
from nanogpt.storage.json_file import finite
from nanogpt.storage.provenance import provenance
from nanogpt.storage.report import Report
from nanogpt.storage.run_dir import REPORT
from nanogpt.training.state import TrainState
from nanogpt.utils.signals import STOP_FILE

EXIT_STATUS = {"target_reached": 0, "max_steps": 3, "max_minutes": 3, "stopped": 4, "non_finite": 1, "lost": 1}


@dataclass(frozen=True)
class Result:
    """How a run ended, on this rank."""

    exit_reason: str  # a key of EXIT_STATUS
    out_dir: Path
    report: Report | None = None  # what report.json holds, on the first rank; None where the run leaves none

    @property
    def status(self) -> int:
        """The exit status. torchrun takes any but 0 for a failure, and restarts the ranks: an orderly stop is none."""
        if self.exit_reason == "stopped" and "TORCHELASTIC_RUN_ID" in os.environ:
            return 0
        return EXIT_STATUS[self.exit_reason]


def make_report(
    reason: str, full_pass_loss: float | None, plan: Plan, state: TrainState, world: World, engine: Engine | None
) -> Report:
    """The report of a run that ends now. Every rank must call.

    The clocks stand when this is called. Where there is a verdict, the scorecard is added to it. engine: None where
    the run ends before it has one.
    """
    config, train_s = plan.config, state.train_s
    compilation = engine.compilation if engine else None
    return Report(
        reached=reason == "target_reached",
        exit_reason=reason,
        target_loss=config.target_loss,
        target_recall=config.target_recall,
        loss=finite(full_pass_loss),
        floor=plan.dataset.floor,
        steps=state.step,
        bad_steps=state.bad_steps,
        tokens=state.meter.tokens,
        launch_s=state.launch_s,
        train_s=train_s,
        device_s=train_s * world.size + state.other_device_s,
        full_pass_s=state.full_pass_s,
        compile_s=compilation.seconds if compilation else 0.0,
        engine=config.engine,
        zero_stage=config.zero_stage,
        world_size=world.size,
        device=world.device_name(),
        dtype=config.dtype,
        compiled=bool(compilation and compilation.compiled),
        cuda_graphs=bool(engine and engine.cuda_graphs),
        peak_memory_bytes=tuple(world.gather(world.peak_memory_bytes())),
        recipe=config.recipe,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        on_plateau=config.on_plateau,
        ema=config.ema,
        head_dtype=config.head_dtype,
        gradient_compression=config.gradient_compression,
        final_learning_rate=finite(state.lr),
        corpus_sha256=plan.dataset.corpus.sha256,
        **subset_and_windows(config),
        control_note=None if plan.dataset.control else "fewer tokens follow the subset than one window needs",
        scores_precision=engine.scores_precision if engine else None,
        code=provenance(),
    )


def write_report(out_dir: Path, report: Report) -> None:
    """The report of a run that has come to its end. Raises RunError when it cannot be written."""
    try:
        report.write(out_dir / REPORT)
    except OSError as error:
        raise RunError(f"{out_dir / REPORT} cannot be written ({error}): make room and start again") from None


def write_stopped(out_dir: Path, report: Report, say: Callable[[str], None]) -> None:
    """The report of a run that was asked to stop. The file STOP has been obeyed: the next run shall not stop too."""
    try:
        report.write(out_dir / REPORT)
    except OSError as error:
        say(f"warning: {out_dir / REPORT} cannot be written ({error.strerror or error})")
    try:
        (out_dir / STOP_FILE).unlink(missing_ok=True)
    except OSError as error:
        say(
            f"warning: {out_dir / STOP_FILE} cannot be removed ({error.strerror or error}): remove it, or the next "
            f"start stops too"
        )
