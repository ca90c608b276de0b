"""One attempt at a run: what it goes on from, that its ranks agree, who hears of it; then its parts, and the loop.

result = train(TrainConfig(subset_tokens=2048))
result.report.loss
"""

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from socket import gethostname

import torch

from nanogpt.config.errors import ConfigError
from nanogpt.config.fault import Fault
from nanogpt.config.train_config import TrainConfig
from nanogpt.data.windows import Windows
from nanogpt.distributed.faults import InjectedFault
from nanogpt.distributed.hardware import peak_flops_per_s
from nanogpt.distributed.replicas import UNLIKE, Replicas
from nanogpt.distributed.watchdog import Watchdog
from nanogpt.distributed.world import World
from nanogpt.engine import Engine, EngineOptions, build_engine
from nanogpt.model.fp8 import fp8_linear
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.monitor.build import open_logger
from nanogpt.monitor.profiler import open_profiler
from nanogpt.monitor.sentinel import Sentinel
from nanogpt.monitor.wandb_logger import check_wandb
from nanogpt.optim.ema import EMA
from nanogpt.plan.checks import check_agreement, examine_ranks, refuse_copies, require_room
from nanogpt.plan.plan import Plan, make_plan
from nanogpt.storage.checkpoint import CheckpointError, CheckpointReader, CheckpointWriter, abandon_after
from nanogpt.storage.hf import load_hf
from nanogpt.storage.provenance import RunInfo, provenance
from nanogpt.storage.resume import ResumePoint, find_start, in_its_own_dtype
from nanogpt.storage.run_dir import write_config
from nanogpt.storage.run_lock import Attempt, Fence, NoFence, hold_run_dir, loss_of, take_over
from nanogpt.token_losses.recorder import open_recorder
from nanogpt.training import endings
from nanogpt.training.checkpoint_manager import CheckpointManager
from nanogpt.training.evaluator import Evaluator
from nanogpt.training.messages import announce
from nanogpt.training.metrics import MetricsProcessor
from nanogpt.training.report import Result
from nanogpt.training.state import RunContext, TrainState
from nanogpt.training.trainer import Trainer, micro_batches
from nanogpt.utils.console import outlive_output
from nanogpt.utils.phases import Phases
from nanogpt.utils.signals import StopRequested, StopSignals


def train(config: TrainConfig, *, launched: float | None = None, stop: StopSignals | None = None) -> Result:
    """Train until the target is verified or a budget is spent -> how it ended.

    launched: time.perf_counter() when the process began; None: now. stop: heeds signals since the process began; None:
    from now on. Raises ConfigError before anything is written, and RunError where the run cannot begin, go on or be
    finished. However it ends, each signal does afterwards what it did before stop was made.
    """
    outlive_output()
    with stop or StopSignals() as stop:
        return _begin(config, time.perf_counter() if launched is None else launched, stop)


def _begin(config: TrainConfig, launched: float, stop: StopSignals) -> Result:
    refuse_copies()
    world = World.from_env()
    plan = make_plan(in_its_own_dtype(config), world)
    found = None
    if world.is_first:
        take_over(plan.config.out_dir, Attempt.from_env())
        found = find_start(plan.config, plan.dataset.corpus.sha256)
        check_wandb(plan.config)
    timeout_s = plan.config.comm_timeout_s
    try:
        store = world.meet(timeout_s=timeout_s, asked_to_stop=lambda: stop.requested)
    except StopRequested:
        return endings.stopped_while_ranks_were_missing(plan, world)
    with (
        Watchdog(world, store, timeout_s=timeout_s) as watchdog,
        world.process_group(store, timeout_s=timeout_s, even_alone=plan.deepspeed is not None),
    ):
        phases = Phases(watchdog)
        with phases("the beginning", patient=True):
            start = world.gather(found)[0]
            assert start is not None, "the first rank looked for it"
            check_agreement(plan, world)
            if start.ended:
                return endings.ended_before(start, world)
            require_room(plan.config, world)
            examine_ranks(plan.config, world)
        with hold_run_dir(start.out_dir, Attempt.from_env()) if world.is_first else nullcontext(NoFence()) as fence:
            return _train(plan, world, start, launched, stop, phases, fence)


def _train(
    plan: Plan, world: World, start: ResumePoint, launched: float, stop: StopSignals, phases: Phases, fence: Fence
) -> Result:
    checkpoint = _open_checkpoint(start)
    left = _claim(plan, world, start, checkpoint)
    peak = peak_flops_per_s(world, plan.config.dtype)  # before W&B's thread, which takes a core for a second
    losses = [loss for _, loss in checkpoint.progress["history"]] if checkpoint else []
    ids = plan.dataset.windows.ids
    logger = open_logger(plan.config, start.out_dir, world, ids=ids, wandb_run_id=start.wandb_run_id, losses=losses)
    if world.is_first:
        stop.look_in(start.out_dir, loss_of(start.out_dir))
    context = RunContext(plan, world, start.out_dir, logger, phases, stop, fence)
    try:
        for line in start.notes:
            logger.say(line)
        if left:
            logger.say(f"checkpoints of later steps than the resumed one, renamed to abandoned_*: {', '.join(left)}")
        if any(world.sum(float(stop.requested))) and not any(world.max(float(stop.is_lost()))):  # before it is compiled
            logger.say("asked to stop before the first step")
            state = TrainState.of(plan.config, judged_windows=len(plan.dataset.judged), launched_at=launched)
            if checkpoint:
                state.load_state_dict(checkpoint.progress, ranks=world.size)
            return endings.stopped(context, state)
        return _build_trainer(context, start, checkpoint, launched_at=launched, peak_flops_per_s=peak).run()
    except BaseException as error:
        logger.died(error)
        raise
    finally:
        with phases("the end", patient=True):
            logger.close()


def _open_checkpoint(start: ResumePoint) -> CheckpointReader | None:
    """What the run goes on from, if anything."""
    try:
        return CheckpointReader(start.checkpoint, verify=False) if start.checkpoint else None
    except CheckpointError as error:  # the first rank has read it
        raise ConfigError(f"{start.checkpoint} {error}: all nodes need one shared file system") from None


def _claim(plan: Plan, world: World, start: ResumePoint, checkpoint: CheckpointReader | None) -> list[str]:
    """Make the run directory this run's -> the checkpoints of later steps, set aside. Every rank must call."""
    hosts = tuple(sorted(set(world.gather(gethostname()))))
    if not world.is_first:
        return []
    # Before it is claimed: killed in between, the same command would go on from a later step.
    left = abandon_after(start.out_dir, checkpoint.step) if checkpoint else []
    info = RunInfo(
        config=asdict(plan.config), corpus_sha256=plan.dataset.corpus.sha256,
        text_files=plan.dataset.corpus.files, floor=plan.dataset.floor,
        world_size=world.size, device=world.device_name(), predicted_memory_bytes=plan.memory.total,
        deepspeed=plan.deepspeed, begun_with=start.begun_with,
        resumed_from=str(start.checkpoint) if start.checkpoint else None, wandb_run_id=start.wandb_run_id,
        hosts=hosts, slurm_job_id=os.environ.get("SLURM_JOB_ID"), code=provenance(),
    )  # fmt: skip
    write_config(start.out_dir, info, fresh=start.fresh, from_step=_first_step_to_log(checkpoint))
    return left


def _first_step_to_log(checkpoint: CheckpointReader | None) -> int:
    """The first step whose row is still to be written."""
    return 0 if checkpoint is None else checkpoint.step + (not checkpoint.progress["step_is_unfinished"])


def _build_trainer(
    context: RunContext,
    start: ResumePoint,
    checkpoint: CheckpointReader | None,
    *,
    launched_at: float,
    peak_flops_per_s: float | None,
) -> Trainer:
    """All that a run is made of, on the device, restored from checkpoint if there is one."""
    plan, world, config, logger = context.plan, context.world, context.plan.config, context.logger
    windows = plan.dataset.windows.on(world.device)
    model = _build_model(context, fresh=checkpoint is None)
    engine = _build_engine(context, model, windows)
    if config.fault and start.fresh:
        _inject(config.fault, context, engine)
    average = EMA(engine.local_weights(), config.ema)
    begun_at = checkpoint.step if checkpoint else 0
    replicas = _watch_replicas(context, engine, average, step=begun_at)
    state = TrainState.of(config, judged_windows=len(plan.dataset.judged), launched_at=launched_at)
    writer = CheckpointWriter(
        start.out_dir, world, keep=config.keep_checkpoints, attempt=str(Attempt.from_env()),
        on_device=plan.memory.checkpoint > 0,
    )  # fmt: skip
    checkpoints = CheckpointManager(context, writer, engine, average, state, replicas, wandb_run_id=start.wandb_run_id)
    profiler = open_profiler(config.profiled_steps, world, start.out_dir, logger, context.phases)
    if checkpoint is not None:
        checkpoints.restore(checkpoint)
    replicas.check(state.step)
    return Trainer(
        context,
        windows=windows,
        engine=engine,
        average=average,
        replicas=replicas,
        sentinel=Sentinel(engine, replicas, config, context.phases, step=begun_at),
        state=state,
        checkpoints=checkpoints,
        evaluator=Evaluator(context, windows, engine, average),
        profiler=profiler,
        metrics=MetricsProcessor(plan, engine, context.phases, peak_flops_per_s=peak_flops_per_s, say=logger.say),
        token_losses=open_recorder(
            config,
            plan.dataset.windows,
            world,
            start.out_dir,
            begun_at=begun_at,
            say=logger.say,
        ),
    )


def _build_model(context: RunContext, *, fresh: bool) -> GPT:
    """The model as a run begins, on the CPU."""
    config = context.plan.config
    torch.manual_seed(config.seed)  # the same weights on every rank, and on every number of ranks
    model = GPT(GPTConfig.from_options(config))
    if config.init_from and fresh:
        load_hf(model, Path(config.init_from))
    if config.head_dtype == "fp8":
        model.lm_head.training_product = fp8_linear
    announce(context.plan, context.world, context.logger, parameters=model.num_parameters())
    return model


def _build_engine(context: RunContext, model: GPT, windows: Windows) -> Engine:
    config = context.plan.config
    hooked = config.fault is not None and config.fault.needs_hooks
    options = EngineOptions(
        dtype=config.dtype,
        optimizer=config.optimizer,
        compile=config.compile == "true" and not hooked,
        micro_batches=micro_batches(config, windows, context.world, step=0),
        deepspeed=context.plan.deepspeed,
        gradient_compression=config.gradient_compression,
        cuda_graphs=not hooked,
    )
    engine = build_engine(config.engine, model, context.world, options)
    if engine.compilation.failure:
        context.logger.say(f"warning: {engine.compilation.failure}; going on without torch.compile")
    return engine


def _inject(fault: Fault, context: RunContext, engine: Engine) -> None:
    context.logger.say(f"warning: this run is broken on purpose (--inject={context.plan.config.inject})")
    if context.world.rank == fault.rank:
        context.phases.listen(InjectedFault(fault, engine.model, engine.local_weights()))


def _watch_replicas(context: RunContext, engine: Engine, average: EMA, *, step: int) -> Replicas:
    """The comparison of what every rank must hold alike."""

    def held() -> Iterator[tuple[str, torch.Tensor]]:
        yield from engine.replicas()
        if average.mean:
            yield from engine.replicas_like_weights("mean", average.mean)

    replicas = Replicas(context.world, held, step=step)
    if not replicas.exact:
        context.logger.say(f"warning: {UNLIKE}")
    return replicas
