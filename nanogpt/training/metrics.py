"""Reads a run's instruments: one row of metrics.jsonl out of its sums, clocks and forecasts.

metrics = MetricsProcessor(plan, engine, phases, peak_flops_per_s=989e12)
metrics.count_step()                        # after each
logger.row(metrics.row(state, full_pass_loss=None))
"""

from math import isfinite
from typing import TypedDict

from nanogpt.engine import Engine
from nanogpt.model.gpt import flops_per_token
from nanogpt.monitor.eta import Eta, NoEta
from nanogpt.monitor.loggers import BY_REFERENCE, Row
from nanogpt.monitor.meters import PhaseClock
from nanogpt.plan.plan import Plan
from nanogpt.plan.reference_runs import comparable_runs
from nanogpt.storage.report import MfuTerms
from nanogpt.training.state import TrainState
from nanogpt.utils.phases import Phases


class MetricsProcessor:
    """One rank's. Every rank must build it and ask for each row."""

    def __init__(self, plan: Plan, engine: Engine, phases: Phases, *, peak_flops_per_s: float | None) -> None:
        self._plan, self._engine, self._world = plan, engine, engine.world
        self._flops_per_token = flops_per_token(engine.model.config, context_length=plan.config.context_length)
        self._peak_flops_per_s = peak_flops_per_s
        self._references = comparable_runs(plan.config, plan.dataset.floor)
        self._clock = PhaseClock()
        phases.listen(self._clock)

    def count_step(self) -> None:
        """A step was trained, refused or not."""
        self._clock.move(self._engine.exposed_communication_s() or 0.0, origin="compute", to="communication")
        self._clock.steps += 1

    def mfu_terms(self) -> MfuTerms:
        """What MFU was computed with, for the report."""
        return MfuTerms(flops_per_token=self._flops_per_token, peak_flops_per_s=self._peak_flops_per_s)

    def row(self, state: TrainState, full_pass_loss: float | None) -> Row:
        """The figures of the steps since the last row, reduced over the ranks; a mean over no step is NaN."""
        loss, tokens_per_s, step_s = state.meter.take()
        if isfinite(loss):
            state.history.append((state.step, loss))
        time_share, rank_step_s = self._clock.take()
        memory_bytes, slowest_s, minus_fastest_s = self._world.max(
            self._world.peak_memory_bytes(), rank_step_s, -rank_step_s
        )
        apart = self._engine.exposed_communication_s() is not None
        shares: dict[str, float | None] = {**time_share}
        if not apart:
            shares["communication"] = None  # some of it is in compute
        config = self._plan.config
        if full_pass_loss is not None and full_pass_loss <= config.target_loss:
            eta: Eta | NoEta = Eta(0.0, 0.0, 0.0)  # it is reached
        elif not isfinite(loss):
            eta = NoEta.NOT_YET
        else:
            dataset = self._plan.dataset
            eta = state.eta(
                config,
                floor=dataset.floor,
                windows_per_epoch=dataset.windows.per_epoch,
                references=self._references,
            )
        peak = self._peak_flops_per_s
        return Row(
            step=state.step, tokens=state.meter.tokens, loss=loss, lr=state.lr, grad_norm=state.grad_norm,
            tokens_per_s=tokens_per_s, step_s=step_s, mfu=self._flops_per_token * tokens_per_s / peak if peak else None,
            **_eta_columns(eta, step_s),
            wall_s=state.train_s, memory_bytes=int(memory_bytes), full_pass_loss=full_pass_loss,
            fastest_rank_step_s=-minus_fastest_s if apart else None, slowest_rank_step_s=slowest_s if apart else None,
            time_share=shares,
        )  # fmt: skip


class _EtaColumns(TypedDict):
    eta_s: float | None
    eta_low_s: float | None
    eta_high_s: float | None
    eta_note: str | None


def _eta_columns(eta: Eta | NoEta, step_s: float) -> _EtaColumns:
    """The columns of a row that say when the run ends, or why nobody knows; all 0 where it has."""
    if isinstance(eta, NoEta):
        return {"eta_s": None, "eta_low_s": None, "eta_high_s": None, "eta_note": eta.value}
    if eta.steps == 0:  # the pass that verifies may follow a row without a step, whose step_s is NaN
        step_s = 0.0
    return {
        "eta_s": eta.steps * step_s,
        "eta_low_s": eta.low * step_s,
        "eta_high_s": eta.high * step_s,
        "eta_note": BY_REFERENCE if eta.by_reference else None,
    }
