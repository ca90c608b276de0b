"""Reads a run's instruments: one row of metrics.jsonl out of its sums, clocks and forecasts.

metrics = MetricsProcessor(plan, engine, phases, peak_flops_per_s=989e12, say=logger.say)
metrics.count_step()                        # after each
logger.row(metrics.row(state, found=None))
"""

from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from socket import gethostname
from typing import TypedDict

from nanogpt.engine import Engine
from nanogpt.evaluate.evaluation import Evaluation
from nanogpt.model.gpt import flops_per_token
from nanogpt.monitor.eta import Eta, NoEta
from nanogpt.monitor.loggers import BY_REFERENCE, TO_THE_LOSS, Row
from nanogpt.monitor.meters import PhaseClock, SlowRanks
from nanogpt.plan.plan import Plan
from nanogpt.plan.reference_runs import comparable_runs
from nanogpt.storage.report import MfuTerms
from nanogpt.training.state import TrainState
from nanogpt.utils.phases import Phases


class MetricsProcessor:
    """One rank's. Every rank must build it and ask for each row."""

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        phases: Phases,
        *,
        peak_flops_per_s: float | None,
        say: Callable[[str], None],
    ) -> None:
        """say: how to tell a person that a rank is slow."""
        self._plan, self._engine, self._world = plan, engine, engine.world
        self._flops_per_token = flops_per_token(engine.model.config, context_length=plan.config.context_length)
        self._peak_flops_per_s = peak_flops_per_s
        self._references = comparable_runs(plan.config, plan.dataset.floor)
        self._clock = PhaseClock()
        phases.listen(self._clock)
        self._forward_s = 0.0  # of the newest step; 0: not told
        ranks = [replace(self._world, rank=rank).rows(plan.config.batch_size) for rank in range(self._world.size)]
        hosts = self._world.gather(gethostname())
        self._slow_ranks = SlowRanks(hosts, windows=[rows.stop - rows.start for rows in ranks], say=say)

    def count_step(self) -> None:
        """A step was trained, refused or not."""
        self._clock.move(self._engine.exposed_communication_s() or 0.0, origin="compute", to="communication")
        self._clock.steps += 1
        self._forward_s = self._engine.forward_s() or 0.0

    def mfu_terms(self) -> MfuTerms:
        """What MFU was computed with, for the report."""
        return MfuTerms(flops_per_token=self._flops_per_token, peak_flops_per_s=self._peak_flops_per_s)

    def row(self, state: TrainState, found: Evaluation | None) -> Row:
        """The figures of the steps since the last row, reduced over the ranks; a mean over no step is NaN."""
        loss, tokens_per_s, step_s = state.meter.take()
        if isfinite(loss):
            state.history.append((state.step, loss))
        time_share, rank_step_s = self._clock.take()
        apart = self._engine.exposed_communication_s() is not None
        own_s, memory_bytes = self._of_ranks(rank_step_s if apart else self._forward_s, self._world.peak_memory_bytes())
        slowest = self._slow_ranks.observe(own_s)
        shares: dict[str, float | None] = {**time_share}
        if not apart:
            shares["communication"] = None  # some of it is in compute
        config = self._plan.config
        if found and found.reaches(config):
            eta: Eta | NoEta = Eta(0.0, 0.0, 0.0)
        elif state.awaits_recall:
            eta = NoEta.RECALL
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
            **_eta_columns(eta, step_s, then_recall=config.target_recall is not None),
            wall_s=state.train_s, memory_bytes=int(max(memory_bytes)),
            full_pass_loss=found.loss if found else None, full_pass_recall=found.recall if found else None,
            fastest_rank_step_s=min(own_s) if apart else None, slowest_rank_step_s=max(own_s) if apart else None,
            slowest_rank=slowest.rank, slowest_rank_host=slowest.host,
            slowest_rank_ratio=slowest.ratio,
            time_share=shares,
        )  # fmt: skip

    def _of_ranks(self, *values: float) -> list[list[float]]:
        """For each of values that of every rank, on every rank."""
        world = self._world
        mine = [value * (rank == world.rank) for value in values for rank in range(world.size)]
        every = list(world.sum(*mine))
        return [every[i : i + world.size] for i in range(0, len(every), world.size)]


class _EtaColumns(TypedDict):
    eta_s: float | None
    eta_low_s: float | None
    eta_high_s: float | None
    eta_note: str | None


def _eta_columns(eta: Eta | NoEta, step_s: float, *, then_recall: bool) -> _EtaColumns:
    """The columns of a row that say when the run ends, or why nobody knows; all 0 where it has.

    then_recall: whether it is to wait for a recall when the loss is there, which nobody can foretell.
    """
    if isinstance(eta, NoEta):
        return {"eta_s": None, "eta_low_s": None, "eta_high_s": None, "eta_note": eta.value}
    if eta.steps == 0:  # the pass that verifies may follow a row without a step, whose step_s is NaN
        return {"eta_s": 0.0, "eta_low_s": 0.0, "eta_high_s": 0.0, "eta_note": None}
    notes = [TO_THE_LOSS] * then_recall + [BY_REFERENCE] * eta.by_reference
    return {
        "eta_s": eta.steps * step_s,
        "eta_low_s": eta.low * step_s,
        "eta_high_s": eta.high * step_s,
        "eta_note": ", ".join(notes) or None,
    }
