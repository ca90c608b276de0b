"""Builds the parts of a run and holds its one loop.

result = Trainer(plan, world, logger, start, launched, stop, watchdog, fence, checkpoint, peak_flops_per_s=peak).run()
"""

import sys
import time
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

import torch

from nanogpt.distributed.replicas import UNLIKE, Replicas
from nanogpt.distributed.watchdog import Watchdog
from nanogpt.distributed.world import World
from nanogpt.engine import Batch, EngineOptions, build_engine
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.monitor.loggers import Logger
from nanogpt.monitor.profiler import open_profiler
from nanogpt.optim.ema import EMA
from nanogpt.optim.schedule import learning_rate
from nanogpt.plan.plan import Plan
from nanogpt.plan.step_time import describe_expected_time
from nanogpt.plots.recall_map import headline
from nanogpt.plots.recall_png import save_recall
from nanogpt.storage.checkpoint import CheckpointReader, CheckpointWriter
from nanogpt.storage.hf import load_hf
from nanogpt.storage.resume import ResumePoint
from nanogpt.storage.run_dir import save_weights
from nanogpt.storage.run_lock import Attempt, Fence
from nanogpt.training.checkpoint_manager import CheckpointManager
from nanogpt.training.evaluator import Evaluator
from nanogpt.training.messages import announce, recite_beginning, tell_recitation, tell_result
from nanogpt.training.metrics import MetricsProcessor
from nanogpt.training.report import Result, make_report, write_report, write_stopped
from nanogpt.training.state import TrainState
from nanogpt.utils.signals import LOST, StopRequested, StopSignals


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        plan: Plan,
        world: World,
        logger: Logger,
        start: ResumePoint,
        launched: float,
        stop: StopSignals,
        watchdog: Watchdog,
        fence: Fence,
        checkpoint: CheckpointReader | None,
        *,
        peak_flops_per_s: float | None,
    ) -> None:
        self.plan, self.config, self.world, self.logger, self.out_dir = plan, plan.config, world, logger, start.out_dir
        self.windows = plan.dataset.windows.on(world.device)
        self.stop, self.watchdog, self.fence = stop, watchdog, fence
        torch.manual_seed(self.config.seed)  # the same weights on every rank, and on every number of ranks
        model = GPT(GPTConfig.from_options(self.config))
        if self.config.init_from and checkpoint is None:
            load_hf(model, Path(self.config.init_from))
        announce(plan, world, logger, parameters=model.num_parameters())
        if checkpoint is None:
            logger.say(
                describe_expected_time(
                    self.config, plan.dataset.floor, peak_flops_per_s=peak_flops_per_s, device_type=world.device.type
                )
            )
        options = EngineOptions(
            dtype=self.config.dtype,
            optimizer=self.config.optimizer,
            compile=self.config.compile == "true",
            micro_batches=self._micro_batches(step=0),
            deepspeed=plan.deepspeed,
            gradient_compression=self.config.gradient_compression,
        )
        self.engine = build_engine(self.config.engine, model, world, options)
        if self.engine.compilation.failure:
            self.logger.say(f"warning: {self.engine.compilation.failure}; going on without torch.compile")
        self.average = EMA(self.engine.local_weights(), self.config.ema)
        self.replicas = Replicas(world, self._held_whole, step=checkpoint.step if checkpoint else 0)
        if not self.replicas.exact:
            self.logger.say(f"warning: {UNLIKE}")
        self.state = TrainState.of(self.config, judged_windows=len(plan.dataset.judged), launched_at=launched)
        checkpointer = CheckpointWriter(
            start.out_dir, world, keep=self.config.keep_checkpoints, attempt=str(Attempt.from_env())
        )
        self.checkpoints = CheckpointManager(
            checkpointer,
            self.engine,
            self.average,
            self.state,
            plan,
            logger,
            fence,
            self.replicas,
            wandb_run_id=start.wandb_run_id,
        )
        self.profiler = open_profiler(self.config.profiled_steps, world, start.out_dir, logger, watchdog)
        if checkpoint is not None:
            self.checkpoints.restore(checkpoint)
        self.replicas.check(self.state.step)
        self.metrics = MetricsProcessor(plan, self.engine, peak_flops_per_s=peak_flops_per_s)
        self.evaluator = Evaluator(plan, self.windows, self.engine, self.average, stop, watchdog)

    def run(self) -> Result:
        """The loop, then scores, files and recitation -> how it ended."""
        result = self._run()
        if self.stop.is_lost():
            message = f"{self.out_dir} was removed, emptied or replaced during the run: what it held is lost"
            print(f"error: {message}", file=sys.stderr, flush=True)
            self.logger.died(FileNotFoundError(message))
            return Result("lost", self.out_dir)
        return result

    def _run(self) -> Result:
        state = self.state
        save = False
        (out_of_time,) = self.world.max(float(self._is_late()))
        self.stop.obey()  # every rank has built and compiled its part
        try:
            if state.verified_loss is not None:  # stopped while it scored what it had reached
                return self._finish("target_reached", state.verified_loss)
            while True:
                if not state.step_is_unfinished:
                    with self.profiler.step(state.step + 1):
                        out_of_time, save = self._train_one_step()
                reason, full_pass_loss = self._judge(bool(out_of_time))
                self.fence.check()
                if reason or full_pass_loss is not None or state.step % self.config.log_every == 0:
                    self._log_row(full_pass_loss)
                state.step_is_unfinished = False
                if reason:
                    return self._finish(reason, full_pass_loss)
                if save or state.step % self.config.checkpoint_every == 0:
                    self.watchdog.at(f"step {state.step}, copying for a checkpoint", patient=True)
                    with self.metrics.clock.phase("checkpoint"):
                        self.checkpoints.begin()
        except StopRequested:
            return self._leave()

    def _train_one_step(self) -> tuple[bool, bool]:
        """One update -> (whether the time is up, whether a checkpoint is overdue)."""
        started = time.perf_counter()
        state = self.state
        number = state.step + 1
        self._at("batch")
        state.lr = learning_rate(self.config, state.schedule.estimate)
        with self.metrics.clock.phase("data"):
            micro_batches = self._micro_batches(state.step)
        with self.metrics.clock.phase("compute"):
            self._at("forward and backward")
            loss_sum = torch.zeros((), device=self.world.device)
            for batch in micro_batches:
                loss_sum += self.engine.forward_backward(batch, is_last=batch is micro_batches[-1])
            # Waits for the device, and the update does not: a GPU makes it while this process counts and prepares.
            loss_sum = loss_sum.item()
            self._at("update")
            state.grad_norm = self.engine.step(state.lr)
        self.metrics.clock.move(self.engine.exposed_communication_s() or 0.0, origin="compute", to="communication")
        self._at("sum over the ranks")
        # Reduced every step: the loss steers the full passes, and all ranks must stop at the same step. It costs one
        # small collective, after the device has been waited for anyway. The first rank's clock decides.
        with self.metrics.clock.phase("communication"):
            loss, out_of_time, overdue, writing, stop = self.world.sum(
                loss_sum,
                float(self._is_late()),
                float(self.world.is_first and self.checkpoints.overdue),
                float(self.checkpoints.writing),
                float(self.stop.requested),
            )
        self._at("weight average")
        state.step = number
        state.step_is_unfinished = True
        with self.metrics.clock.phase("compute"):
            self._count(loss, started)
        self.metrics.clock.steps += 1
        if not writing:
            self.watchdog.at(f"step {number}, completing a checkpoint", patient=True)
            with self.metrics.clock.phase("checkpoint"):
                self.checkpoints.commit()
        if stop:
            raise StopRequested
        return out_of_time > 0, overdue > 0

    def _is_late(self) -> bool:
        """Whether max_minutes are over, by the first rank's clock; never on another rank."""
        minutes = self.config.max_minutes
        return self.world.is_first and minutes is not None and self.state.train_s > 60 * minutes

    def _at(self, phase: str) -> None:
        """The step that is being trained begins with phase."""
        self.watchdog.at(f"step {self.state.step + 1}, {phase}")
        self.profiler.at(phase)

    def _count(self, loss_sum: float, started: float) -> None:
        """Take a step, begun at started, into the average and the sums; loss_sum: over all ranks, in nats."""
        state = self.state
        step_tokens = self.config.batch_size * self.config.context_length
        if isfinite(loss_sum) and isfinite(state.grad_norm):
            state.bad_steps_in_a_row = 0
            state.schedule.observe(loss_sum / step_tokens)
            if state.schedule.averaging:
                self.average.update()
            state.meter.add(loss_sum, step_tokens, time.perf_counter() - started)
        else:
            state.bad_steps += 1
            state.bad_steps_in_a_row += 1
            self.logger.say(
                f"step {state.step}: loss {loss_sum / step_tokens:g}, gradient norm {state.grad_norm:g}: not applied"
            )

    def _held_whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What every rank must hold alike."""
        yield from self.engine.replicas()
        if self.average.mean:
            yield from self.engine.replicas_like_weights("mean", self.average.mean)

    def _micro_batches(self, step: int) -> list[Batch]:
        """This rank's rows of a step's global batch, as many at a time as memory allows."""
        config, windows = self.config, self.windows
        mine = windows.global_batch(step, config.batch_size)[self.world.rows(config.batch_size)]
        batches = []
        for starts in mine.split(config.micro_batch_size):
            idx, targets = windows.take(starts)
            batches.append(Batch(idx, targets, config.batch_size * config.context_length))
        return batches

    def _judge(self, out_of_time: bool) -> tuple[str | None, float | None]:
        """(why the run ends here, if it does; the loss of a full pass, if one was made)."""
        budget_is_spent = self._reason_to_stop(None, out_of_time) in ("max_steps", "max_minutes")
        if budget_is_spent:
            # Saved first: a run that is given a larger budget later goes on as if this one had not ended.
            self._save_and_wait()
        full_pass_loss = None
        if self.state.schedule.due() or budget_is_spent:  # the report says where the run stood
            full_pass_loss = self._full_pass()
        return self._reason_to_stop(full_pass_loss, out_of_time), full_pass_loss

    def _full_pass(self) -> float:
        started = time.perf_counter()
        with self.metrics.clock.phase("full_pass"):
            loss = self.evaluator.full_pass(step=self.state.step)
            if loss <= self.config.target_loss:  # else it may be the mean loss of models that differ
                self.replicas.check(self.state.step)
        self.state.schedule.judged(loss)
        self.state.full_pass_s += time.perf_counter() - started
        return loss

    def _reason_to_stop(self, full_pass_loss: float | None, out_of_time: bool) -> str | None:
        if full_pass_loss is not None and full_pass_loss <= self.config.target_loss:
            return "target_reached"
        if self.state.bad_steps_in_a_row >= self.config.max_bad_steps:
            return "non_finite"
        if self.config.max_steps is not None and self.state.step >= self.config.max_steps:
            return "max_steps"
        return "max_minutes" if out_of_time else None

    def _log_row(self, full_pass_loss: float | None) -> None:
        self.logger.row(self.metrics.row(self.state, full_pass_loss))

    def _save_and_wait(self) -> None:
        self.watchdog.at(f"step {self.state.step}, saving", patient=True)
        with self.metrics.clock.phase("checkpoint"):
            self.checkpoints.save_and_wait()

    def _leave(self) -> Result:
        """Save, and leave in the middle of the run -> how it ended."""
        asked = next(name for name in self.world.gather(self.stop.name) if name)
        if asked == LOST:
            return Result(
                "lost", self.out_dir
            )  # without a save: whoever removed it does not want it back, or it is another run's now
        self.logger.say(f"asked to stop by {asked} at step {self.state.step}: saving")
        self._save_and_wait()
        report = make_report("stopped", None, self.plan, self.state, self.world, self.engine)
        if self.world.is_first:
            write_stopped(self.out_dir, report, self.logger.say)
        if self.checkpoints.newest is None:
            self.logger.say("warning: nothing could be saved: the same command begins again")
        else:
            saved = "saved" if self.checkpoints.newest == self.state.step else "warning: this step could not be saved"
            self.logger.say(f"{saved}; the same command goes on from step {self.checkpoints.newest}")
        # Last, as a profile, a picture and W&B take seconds, and whoever asked may kill.
        self.profiler.close()
        self.logger.result(report, None)
        return Result("stopped", self.out_dir, report)

    def _finish(self, reason: str, full_pass_loss: float | None) -> Result:
        """Weights, scores and report into the run directory, the result on the terminal -> how it ended."""
        self.profiler.close()
        self.replicas.check(self.state.step)
        report = make_report(reason, full_pass_loss, self.plan, self.state, self.world, self.engine)
        report |= self.metrics.constants()
        self.watchdog.at(f"the end, step {self.state.step}", patient=True)
        if reason == "target_reached":
            self.state.verified_loss = full_pass_loss
        if reason == "non_finite":
            self.checkpoints.commit()
        else:
            self._save_and_wait()
        with self.evaluator.weights():
            if full_pass_loss is not None:
                started = time.perf_counter()
                self.logger.say("scoring what was memorised")
                card = self.evaluator.scorecard(step=self.state.step)
                report |= card.values() | {"scores_s": time.perf_counter() - started}
                self.watchdog.at(f"the end, step {self.state.step}", patient=True)
            state = self.engine.state_dict()
            self.fence.check()
            if self.world.is_first:
                # Without a pass they are older than these weights.
                evaluated = self.evaluator.evaluated if full_pass_loss is not None else {}
                report |= {"weights_sha256": save_weights(self.out_dir, state, evaluated)}
                write_report(self.out_dir, report)
            recitation = recite_beginning(self.engine.model, self.plan) if full_pass_loss is not None else None
            if recitation:
                tell_result(report, self.logger)
                tell_recitation(recitation, self.logger)
                if self.world.is_first:  # before W&B hears of the result and sends it
                    save_recall(self.out_dir, card.recited, headline(self.config.data, report), self.logger.say)
            elif self.world.is_first:
                print(
                    f"error: {self.state.bad_steps_in_a_row} steps in a row had a non-finite loss or gradient; the "
                    f"weights saved are from before them: try a lower --learning_rate, or --dtype=fp32",
                    file=sys.stderr,
                )
        self.logger.result(report, recitation)
        return Result(reason, self.out_dir, report)
