"""Builds the parts of a run and holds its one loop.

status = train(TrainConfig(subset_tokens=2048), launched=time.perf_counter())
"""

import sys
import time
from dataclasses import asdict
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from nanogpt.config import TrainConfig
from nanogpt.data import hop_length
from nanogpt.engine import Batch, build_engine
from nanogpt.errors import ConfigError
from nanogpt.eta import steps_to_target
from nanogpt.loggers import Logger, Row, duration, open_logger
from nanogpt.metrics import Meter
from nanogpt.model import GPT
from nanogpt.optim import WeightAverage, learning_rate, plateau_begins_at
from nanogpt.plan import Plan, floor_warning, make_plan
from nanogpt.recall import full_pass, scorecard
from nanogpt.recite import generate, verdict
from nanogpt.run_dir import REPORT, check_free, claim, model_config, save_weights
from nanogpt.stopping import PassSchedule
from nanogpt.strict_json import write_json
from nanogpt.tokenizer import encoding
from nanogpt.world import World

RECITE_TOKENS = 160  # shown at the end: past the context, by window hops
EXIT_STATUS = {"target_reached": 0, "max_steps": 3, "max_minutes": 3, "non_finite": 1}


def train(config: TrainConfig, *, launched: float) -> int:
    """Train until the target is verified or a budget is spent -> the exit status (EXIT_STATUS).

    launched: time.perf_counter() when the process began. Raises ConfigError before anything is written.
    """
    world = World.from_env()
    plan = make_plan(config, world)
    out_dir = check_free(config.out_dir) if world.is_first else Path(config.out_dir)
    with world.process_group():
        _agree(plan, world)
        if world.is_first:
            claim(
                out_dir, plan.config, corpus_sha256=plan.corpus.sha256, floor=plan.floor, world_size=world.size,
                device=world.device_name(),
            )  # fmt: skip
        logger = open_logger(is_first=world.is_first, out_dir=out_dir, target_loss=config.target_loss)
        try:
            return Trainer(plan, world, logger, out_dir, launched).run()
        finally:
            logger.close()


def _agree(plan: Plan, world: World) -> None:
    """Refuse to train when a rank has another text, device or option than the first: it would hang or train on both."""
    everyone = world.gather(asdict(plan.config) | {"SHA-256 of the text": plan.corpus.sha256})
    for rank, other in enumerate(everyone):
        for name, value in other.items():
            if value != everyone[0][name]:
                raise ConfigError(f"rank {rank} has {name} {value}, rank 0 {everyone[0][name]}: make them the same")


class Trainer:
    """One run on one rank."""

    def __init__(self, plan: Plan, world: World, logger: Logger, out_dir: Path, launched: float) -> None:
        self.plan, self.config, self.world, self.logger, self.out_dir = plan, plan.config, world, logger, out_dir
        self.launched = launched
        self.step = 0
        self.bad_steps = 0  # non-finite ones, never applied
        self.bad_steps_in_a_row = 0
        self.full_pass_s = 0.0
        self.meter = Meter()
        self.history: list[tuple[int, float]] = []  # (step, mean loss) of each logged row
        self.schedule = PassSchedule(self.config.target_loss, len(plan.judged), self.config.batch_size)
        torch.manual_seed(self.config.seed)  # the same weights on every rank, and on every number of ranks
        model = GPT(model_config(self.config))
        self._announce(model.num_parameters())
        self.engine = build_engine(
            self.config.engine, model, world,
            dtype=self.config.dtype, micro_batches=self._micro_batches(), compile=self.config.compile == "true",
        )  # fmt: skip
        self.average = WeightAverage(self.engine.model, self.config.ema)
        self.started = time.perf_counter()

    def run(self) -> int:
        """The loop, then scores, files and recitation -> the exit status."""
        while True:
            out_of_time = self._train_one_step()
            full_pass_loss = self._full_pass() if self.schedule.due() else None
            reason = self._reason_to_stop(full_pass_loss, out_of_time)
            if full_pass_loss is None and reason in ("max_steps", "max_minutes"):
                full_pass_loss = self._full_pass()  # the report says where the run stood
                reason = self._reason_to_stop(full_pass_loss, out_of_time)
            if reason or full_pass_loss is not None or self.step % self.config.log_every == 0:
                self._log_row(full_pass_loss)
            if reason:
                return self._finish(reason, full_pass_loss)

    def _train_one_step(self) -> bool:
        """One update -> whether the time is up."""
        started = time.perf_counter()
        self.lr = learning_rate(self.config, self.schedule.estimate)
        micro_batches = self._micro_batches()
        loss_sum = torch.zeros((), device=self.world.device)
        for batch in micro_batches:
            loss_sum += self.engine.forward_backward(batch, is_last=batch is micro_batches[-1])
        self.grad_norm = self.engine.step(self.lr)
        late = self.config.max_minutes is not None and started - self.started > self.config.max_minutes * 60
        # Reduced every step: the loss steers the full passes, and all ranks must stop at the same step. It costs one
        # small collective, after engine.step has waited for the device anyway. The first rank's clock decides.
        loss, out_of_time = self.world.sum(loss_sum.item(), float(late and self.world.is_first))
        self.step += 1
        step_tokens = self.config.batch_size * self.config.context_length
        if isfinite(loss) and isfinite(self.grad_norm):
            self.bad_steps_in_a_row = 0
            self.schedule.observe(loss / step_tokens)
            begun = self.average.has_begun or self.schedule.estimate < plateau_begins_at(self.config)
            if begun and self.config.ema:
                self.average.update()
            self.meter.add(loss, step_tokens, time.perf_counter() - started)
        else:
            self.bad_steps += 1
            self.bad_steps_in_a_row += 1
            self.logger.say(
                f"step {self.step}: loss {loss / step_tokens:g}, gradient norm {self.grad_norm:g}: not applied"
            )
        return out_of_time > 0

    def _micro_batches(self) -> list[Batch]:
        """This rank's rows of the next global batch, as many at a time as memory allows."""
        config, windows, device = self.config, self.plan.windows, self.world.device
        mine = windows.global_batch(self.step, config.batch_size)[self.world.rows(config.batch_size)]
        batches = []
        for starts in mine.split(config.micro_batch_size):
            idx, targets = windows.take(starts)
            batches.append(Batch(idx.to(device), targets.to(device), config.batch_size * config.context_length))
        return batches

    def _full_pass(self) -> float:
        started = time.perf_counter()
        self.average.exchange()
        loss = full_pass(self.engine.model, self.plan.windows, self.plan.judged, self.world, **self._compute())
        self.average.exchange()
        self.schedule.judged(loss)
        self.full_pass_s += time.perf_counter() - started
        return loss

    def _compute(self) -> dict[str, Any]:
        """How to run the model forward within the memory that a training step needs."""
        return {"dtype": self.config.dtype, "rows": self.config.micro_batch_size}

    def _reason_to_stop(self, full_pass_loss: float | None, out_of_time: bool) -> str | None:
        if full_pass_loss is not None and full_pass_loss <= self.config.target_loss:
            return "target_reached"
        if self.bad_steps_in_a_row >= self.config.max_bad_steps:
            return "non_finite"
        if self.config.max_steps is not None and self.step >= self.config.max_steps:
            return "max_steps"
        return "max_minutes" if out_of_time else None

    def _log_row(self, full_pass_loss: float | None) -> None:
        """Reduce and write the figures of the steps since the last row; a mean over no step is NaN."""
        (memory_bytes,) = self.world.max(self.world.peak_memory_bytes())
        loss, tokens_per_s = self.meter.take()
        if isfinite(loss):
            self.history.append((self.step, loss))
        reachable = self.plan.floor < self.config.target_loss
        eta = steps_to_target(self.history, self.config.target_loss) if reachable else None
        step_s = self.config.batch_size * self.config.context_length / tokens_per_s
        eta_s, eta_low_s, eta_high_s = (s * step_s for s in (eta.steps, eta.low, eta.high)) if eta else (None,) * 3
        self.logger.row(
            Row(
                step=self.step, tokens=self.meter.tokens, loss=loss, lr=self.lr, grad_norm=self.grad_norm,
                tokens_per_s=tokens_per_s, mfu=None, eta_s=eta_s, eta_low_s=eta_low_s, eta_high_s=eta_high_s,
                wall_s=time.perf_counter() - self.started, memory_bytes=int(memory_bytes),
                full_pass_loss=full_pass_loss,
            )
        )  # fmt: skip

    def _announce(self, parameters: int) -> None:
        config, world, plan = self.config, self.world, self.plan
        self.logger.say(
            f"{parameters:,} parameters memorise {config.subset_tokens:,} tokens of {config.data}, until a full pass "
            f"gives {config.target_loss:g} nats/token (entropy floor {plan.floor:.3f})"
        )
        self.logger.say(
            f"{config.batch_size} x {config.context_length} tokens a step on {world.size} x {world.device_name()}, "
            f"engine {config.engine}, {config.dtype}; writing {config.out_dir}/"
        )
        if plan.floor >= config.target_loss:
            self.logger.say("warning: " + floor_warning(config.target_loss, plan.floor))

    def _finish(self, reason: str, full_pass_loss: float | None) -> int:
        ended = time.perf_counter()
        config, plan, world, model = self.config, self.plan, self.world, self.engine.model
        self.average.exchange()  # the weights that were judged are the run's result
        if full_pass_loss is not None:
            outcome = "target reached" if reason == "target_reached" else f"target NOT reached ({reason})"
            self.logger.say(
                f"{outcome}: full-pass loss {full_pass_loss:.4f} (target {config.target_loss:g}) "
                f"after {self.step} steps, {duration(ended - self.started)} of training"
            )
        scores = scorecard(model, plan.windows, world, **self._compute()) if full_pass_loss is not None else {}
        report = {
            "reached": reason == "target_reached",
            "exit_reason": reason,
            "target_loss": config.target_loss,
            "loss": full_pass_loss,
            "floor": plan.floor,
            **scores,
            "steps": self.step,
            "bad_steps": self.bad_steps,
            "tokens": self.meter.tokens,
            "launch_s": ended - self.launched,
            "train_s": ended - self.started,
            "device_s": (ended - self.started) * world.size,
            "full_pass_s": self.full_pass_s,
            "compile_s": self.engine.compile_s,
            "engine": config.engine,
            "world_size": world.size,
            "device": world.device_name(),
            "dtype": config.dtype,
            "compiled": self.engine.compiled,
            "on_plateau": config.on_plateau,
            "ema": config.ema,
            "final_learning_rate": self.lr,
            "corpus_sha256": plan.corpus.sha256,
            "subset_tokens": config.subset_tokens,
        }
        if world.is_first:
            save_weights(self.out_dir, model)
            write_json(self.out_dir / REPORT, report)
            self._tell(report)
        return EXIT_STATUS[reason]

    def _tell(self, report: dict[str, Any]) -> None:
        """The result in a few lines, and the text from the model's own mouth."""
        if report["exit_reason"] == "non_finite":
            print(
                f"error: {self.bad_steps_in_a_row} steps in a row had a non-finite loss or gradient; the weights saved "
                f"are from before them: try a lower --learning_rate, or --dtype=fp32",
                file=sys.stderr,
            )
            return
        recall = report["recall"]
        self.logger.say(
            f"{recall['exact_recall']:.1%} of {recall['exact_recall_prompts']} random prompts of "
            f"{recall['prefix_tokens']} tokens bring back the next {recall['continuation_tokens']} exactly; recited "
            f"from its beginning and put right at each break, the text breaks {recall['recitation_breaks']} times in "
            f"{recall['recited_tokens']} tokens"
        )
        ids, length = self.plan.windows.ids.tolist(), self.config.context_length
        first = ids[: hop_length(length)]
        said = islice(generate(self.engine.model, first, context_length=length), RECITE_TOKENS)
        prompt, answer, text = (encoding().decode_bytes(tokens) for tokens in (first, list(said), ids))
        self.logger.say((prompt + answer).decode(errors="replace"))
        self.logger.say(verdict(prompt, answer, text))
