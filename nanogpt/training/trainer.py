"""The one loop: step, evaluate, log, save, until the run ends.

result = Trainer(context, engine=engine, ...).run()     # the parts are built in nanogpt/training/run.py
"""

import time
from dataclasses import replace
from math import isfinite

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.data.windows import Windows
from nanogpt.distributed.replicas import Replicas
from nanogpt.distributed.world import World
from nanogpt.engine import Batch, Engine
from nanogpt.evaluate.evaluation import Evaluation
from nanogpt.monitor.profiler import NullProfiler
from nanogpt.monitor.sentinel import Sentinel
from nanogpt.optim.ema import EMA
from nanogpt.optim.schedule import learning_rate
from nanogpt.token_losses.recorder import TokenLossRecorder
from nanogpt.training import endings
from nanogpt.training.checkpoint_manager import CheckpointManager
from nanogpt.training.evaluator import Evaluator
from nanogpt.training.metrics import MetricsProcessor
from nanogpt.training.report import Result, make_report
from nanogpt.training.state import RunContext, TrainState
from nanogpt.utils.signals import LOOK_S, LOST, StopRequested


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        context: RunContext,
        *,
        windows: Windows,
        engine: Engine,
        average: EMA,
        replicas: Replicas,
        sentinel: Sentinel,
        state: TrainState,
        checkpoints: CheckpointManager,
        evaluator: Evaluator,
        profiler: NullProfiler,
        metrics: MetricsProcessor,
        token_losses: TokenLossRecorder,
    ) -> None:
        """windows: the plan's, where the model is. The state, engine and average of a resumed run are restored."""
        self.context, self.config = context, context.plan.config
        self.world, self.phases, self.logger, self.stop = context.world, context.phases, context.logger, context.stop
        self.windows, self.engine, self.average = windows, engine, average
        self.replicas, self.sentinel = replicas, sentinel
        self.state, self.checkpoints, self.evaluator = state, checkpoints, evaluator
        self.profiler, self.metrics, self.token_losses = profiler, metrics, token_losses

    def run(self) -> Result:
        """The loop, then scores, files and recitation -> how it ended."""
        try:
            result = self._run()
        finally:
            self.engine.close()
        if result.exit_reason != "lost" and self.stop.is_lost():
            return endings.lost(self.context)
        return result

    def _run(self) -> Result:
        state = self.state
        (late,) = self.world.max(float(self._is_late()))
        out_of_time, save_is_overdue = late > 0, False
        self.stop.obey()  # every rank has built and compiled its part
        try:
            if state.verified is not None:  # stopped while it scored what it had reached, or ended
                if state.verified.reaches(self.config):
                    return self._finish("target_reached", state.verified)
                state.verified, state.awaits_recall = None, True  # it goes on to a target_recall
                state.schedule.settle()
            while True:
                if not state.step_is_unfinished:
                    with self.profiler.step(state.step + 1):
                        out_of_time, save_is_overdue = self._step()
                reason, found = self._evaluate(out_of_time)
                self.context.fence.check(LOOK_S)
                if reason or found or state.step % self.config.log_every == 0:
                    self.context.fence.check()
                    self.logger.row(self.metrics.row(state, found))
                    with self.phases("token losses", state.step, patient=True):
                        self.token_losses.record(state.step)
                state.step_is_unfinished = False
                if reason:
                    return self._finish(reason, found)
                self.sentinel.compare_replicas(state.step)
                if save_is_overdue or state.step % self.config.checkpoint_every == 0:
                    with self.phases("copying for a checkpoint", state.step, patient=True):
                        self.checkpoints.begin()
        except StopRequested:
            return self._leave()

    def _step(self) -> tuple[bool, bool]:
        """One update -> (whether the time is up, whether a checkpoint is overdue)."""
        started = time.perf_counter()
        state, phases = self.state, self.phases
        number = state.step + 1
        with phases("batch", number):
            state.lr = learning_rate(self.config, state.schedule.estimate)
            batches = micro_batches(self.config, self.windows, self.world, state.step)
        with phases("forward and backward", number), self.sentinel.listening(number):
            for batch in batches:
                self.engine.forward_backward(batch, is_last=batch is batches[-1])
        checking = time.perf_counter()
        self.sentinel.check_gradient(number, self._newest_batch_of)
        started += time.perf_counter() - checking  # it is no part of the step
        with phases("update", number):
            # Summed every step: the loss steers the full passes, and all ranks must stop at the same step. The first
            # rank's clock decides.
            result = self.engine.step(
                state.lr,
                float(self._is_late()),
                float(self.world.is_first and self.checkpoints.overdue),
                float(self.checkpoints.writing),
                float(self.stop.requested),
            )
        late, overdue, writing, stop = result.figures
        with phases("weight average", number):
            state.step, state.grad_norm = number, result.grad_norm
            state.step_is_unfinished = True
            self._count(result.loss_sum, started)
        self.metrics.count_step()
        self.token_losses.count(number, self.engine.losses)
        if not writing:
            with phases("completing a checkpoint", number, patient=True):
                self.checkpoints.commit()
        if stop:
            raise StopRequested
        return late > 0, overdue > 0

    def _newest_batch_of(self, rank: int) -> Batch:
        """The last micro-batch of any rank in the step that is under way."""
        return micro_batches(self.config, self.windows, replace(self.world, rank=rank), self.state.step)[-1]

    def _count(self, loss_sum: float, started: float) -> None:
        """Take a step, begun at started, into the average and the sums; loss_sum: over all ranks, in nats."""
        state = self.state
        step_tokens = self.config.batch_size * self.config.context_length
        if isfinite(loss_sum) and isfinite(state.grad_norm):
            state.bad_steps_in_a_row = 0
            state.schedule.observe(loss_sum / step_tokens)
            if state.schedule.averaging:
                self.average.update()
            if state.step % self.config.log_every == 0 or state.schedule.due():
                self.world.wait_for_device()  # else the update is done in the time of what follows, not of this step
            state.meter.add(loss_sum, step_tokens, time.perf_counter() - started)
        else:
            state.bad_steps += 1
            state.bad_steps_in_a_row += 1
            self.logger.say(
                f"warning: step {state.step}: update skipped, as the loss ({loss_sum / step_tokens:g} nats/token) or "
                f"the gradient norm ({state.grad_norm:g}) is not finite"
            )

    def _is_late(self) -> bool:
        """Whether max_minutes are over, by the first rank's clock; never on another rank."""
        minutes = self.config.max_minutes
        return self.world.is_first and minutes is not None and self.state.train_s > 60 * minutes

    def _evaluate(self, out_of_time: bool) -> tuple[str | None, Evaluation | None]:
        """(why the run ends here, if it does; what a full pass found, if one was made)."""
        reason = self._reason_to_stop(None, out_of_time)
        budget_is_spent = reason in ("max_steps", "max_minutes")
        if budget_is_spent:
            # Saved first: a run that is given a larger budget later goes on as if this one had not ended.
            self._save_and_wait()
        found = None
        # At the end the report says where the run stood.
        if budget_is_spent or (self.state.schedule.due() and not self._finds_nothing()):
            found = self._full_pass(is_last=reason is not None)
        return self._reason_to_stop(found, out_of_time), found

    def _finds_nothing(self) -> bool:
        """Whether a look at a few windows shows that a full pass, which is due, would not find the recall."""
        state, started = self.state, time.perf_counter()
        if not state.awaits_recall:
            return False
        with self.phases("full pass or scores", state.step):
            cost = self.evaluator.rules_out_recall(state.missed)
        if cost:
            state.schedule.looked(cost)
        state.full_pass_s += time.perf_counter() - started
        return cost > 0

    def _full_pass(self, *, is_last: bool) -> Evaluation:
        started = time.perf_counter()
        with self.phases("full pass or scores", self.state.step):
            state = self.state
            found = self.evaluator.full_pass(step=state.step, is_last=is_last)
            if found.reaches(self.config):  # else it may be the mean loss of models that differ
                self.replicas.check(state.step)
        state.awaits_recall = found.recall is not None and found.loss <= self.config.target_loss
        state.missed = found.missed
        state.schedule.judged(found.loss, passes=found.cost)
        state.full_pass_s += time.perf_counter() - started
        return found

    def _reason_to_stop(self, found: Evaluation | None, out_of_time: bool) -> str | None:
        if found and found.reaches(self.config):
            return "target_reached"
        if self.state.bad_steps_in_a_row >= self.config.max_bad_steps:
            return "non_finite"
        if self.config.max_steps is not None and self.state.step >= self.config.max_steps:
            return "max_steps"
        return "max_minutes" if out_of_time else None

    def _save_and_wait(self) -> None:
        with self.phases("saving", self.state.step, patient=True):
            self.checkpoints.save_and_wait()

    def _leave(self) -> Result:
        """Save, and leave in the middle of the run -> how it ended."""
        asked = next(name for name in self.world.gather(self.stop.name) if name)
        if asked == LOST:
            return endings.lost(self.context)
        self.logger.say(f"asked to stop by {asked} at step {self.state.step}: saving")
        self._save_and_wait()
        with self.phases("token losses", self.state.step, patient=True):
            self.token_losses.record(self.state.step)
            self.token_losses.save()
        return endings.stopped(self.context, self.state, self.engine, once_reported=self._say_what_is_saved)

    def _say_what_is_saved(self) -> None:
        """From where the same command goes on; and the profile of the steps so far."""
        newest = self.checkpoints.newest
        if newest is None:
            self.logger.say("warning: no checkpoint could be saved: the same command starts from the beginning")
        else:
            saved = "saved" if newest == self.state.step else "warning: this step could not be saved"
            self.logger.say(f"{saved}; the same command goes on from step {newest}")
        self.profiler.close()

    def _finish(self, reason: str, found: Evaluation | None) -> Result:
        """A last save, and the run is over -> how it ended."""
        self.profiler.close()
        self.replicas.check(self.state.step)
        report = make_report(
            reason, found.loss if found else None, self.context.plan, self.state, self.world, self.engine
        )
        report = replace(report, mfu=self.metrics.mfu_terms())
        with self.phases(f"the end, step {self.state.step}", patient=True):
            if reason == "target_reached":
                self.state.verified = found
            if reason == "non_finite":
                self.checkpoints.commit()
            else:
                self._save_and_wait()
        was_evaluated = found is not None
        return endings.finished(
            self.context,
            report,
            self.state,
            self.engine,
            self.evaluator,
            self.token_losses,
            was_evaluated=was_evaluated,
        )


def micro_batches(config: ResolvedConfig, windows: Windows, world: World, step: int) -> list[Batch]:
    """This rank's rows of a step's global batch, as many at a time as memory allows."""
    mine = windows.global_batch(step, config.batch_size)[world.rows(config.batch_size)]
    batches = []
    for starts in mine.split(config.micro_batch_size):
        idx, targets = windows.take(starts)
        batches.append(Batch(idx, targets, config.batch_size * config.context_length))
    return batches
