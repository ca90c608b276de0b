"""One attempt at a run: what it goes on from, that its ranks agree, who hears of it; then the loop.

result = train(TrainConfig(subset_tokens=2048))
result.report["loss"]
"""

import os
import time
from contextlib import nullcontext
from pathlib import Path
from socket import gethostname

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.hardware import peak_flops_per_s
from nanogpt.distributed.watchdog import Watchdog
from nanogpt.distributed.world import World
from nanogpt.monitor.build import open_logger
from nanogpt.monitor.wandb_logger import check_wandb
from nanogpt.plan.checks import check_agreement, examine_ranks, refuse_copies, require_room
from nanogpt.plan.plan import Plan, make_plan
from nanogpt.storage.checkpoint import CheckpointError, CheckpointReader, abandon_after
from nanogpt.storage.json_file import read_json
from nanogpt.storage.resume import ResumePoint, find_start, in_its_own_dtype
from nanogpt.storage.run_dir import FINISHED, REPORT, write_config
from nanogpt.storage.run_lock import Attempt, Fence, NoFence, hold_run_dir, loss_of, take_over
from nanogpt.training.report import Result, make_report, write_stopped
from nanogpt.training.state import TrainState
from nanogpt.training.trainer import Trainer
from nanogpt.utils.console import outlive_output
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
    start = None
    if world.is_first:
        take_over(plan.config.out_dir, Attempt.from_env())
        start = find_start(plan.config, plan.dataset.corpus.sha256)
        check_wandb(plan.config)
    timeout_s = plan.config.comm_timeout_s
    try:
        store = world.meet(timeout_s=timeout_s, asked_to_stop=lambda: stop.requested)
    except StopRequested:
        if world.is_first:
            print("asked to stop while other ranks were missing", flush=True)
        return Result("stopped", Path(plan.config.out_dir))
    with (
        Watchdog(world, store, timeout_s=timeout_s) as watchdog,
        world.process_group(store, timeout_s=timeout_s, sharded=plan.deepspeed is not None),
    ):
        watchdog.at("the beginning", patient=True)
        start = world.gather(start)[0]
        check_agreement(plan, world)
        if start.ended:
            if world.is_first:
                has = "has reached its target" if start.ended == "target_reached" else f"has spent its --{start.ended}"
                print(f"{start.out_dir} {has} already: nothing to do")
            report = read_json(start.out_dir / REPORT, of=FINISHED) if world.is_first else {}
            return Result(start.ended, start.out_dir, report)
        require_room(plan.config, world)
        examine_ranks(plan.config, world)
        with hold_run_dir(start.out_dir, Attempt.from_env()) if world.is_first else nullcontext(NoFence()) as fence:
            return _train(plan, world, start, launched, stop, watchdog, fence)


def _train(
    plan: Plan, world: World, start: ResumePoint, launched: float, stop: StopSignals, watchdog: Watchdog, fence: Fence
) -> Result:
    try:
        checkpoint = CheckpointReader(start.checkpoint, verify=False) if start.checkpoint else None
    except CheckpointError as error:  # the first rank has read it
        raise ConfigError(f"{start.checkpoint} {error}: every node needs the same disk") from None
    hosts = sorted(set(world.gather(gethostname())))
    left = []
    if world.is_first:
        if checkpoint:  # before it is claimed: killed in between, the same command would go on from a later step
            left = abandon_after(start.out_dir, checkpoint.step)
        write_config(
            start.out_dir, plan.config, fresh=start.fresh, from_step=_first_step_to_log(checkpoint),
            corpus_sha256=plan.dataset.corpus.sha256, floor=plan.dataset.floor,
            world_size=world.size, device=world.device_name(),
            predicted_memory_bytes=plan.memory.total, deepspeed=plan.deepspeed,
            begun_with=start.begun_with, resumed_from=str(start.checkpoint) if start.checkpoint else None,
            wandb_run_id=start.wandb_run_id, hosts=hosts, slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        )  # fmt: skip
    peak = peak_flops_per_s(world, plan.config.dtype)  # before W&B's thread, which takes a core for a second
    losses = [loss for _, loss in checkpoint.progress["history"]] if checkpoint else []
    logger = open_logger(plan.config, start.out_dir, world, wandb_run_id=start.wandb_run_id, losses=losses)
    if world.is_first:
        stop.look_in(start.out_dir, loss_of(start.out_dir))
    try:
        for line in start.notes:
            logger.say(line)
        if left:
            logger.say(f"set aside as abandoned_*: {', '.join(left)}, of later steps than the one that is resumed")
        if any(world.sum(float(stop.requested))) and not any(world.max(float(stop.is_lost()))):  # before it is compiled
            logger.say("asked to stop before the first step")
            state = TrainState.of(plan.config, judged_windows=len(plan.dataset.judged), launched_at=launched)
            if checkpoint:
                state.load_state_dict(checkpoint.progress, ranks=world.size)
            report = make_report("stopped", None, plan, state, world, None)
            if world.is_first:
                write_stopped(start.out_dir, report, logger.say)
            logger.result(report, None)
            return Result("stopped", start.out_dir, report)
        return Trainer(
            plan, world, logger, start, launched, stop, watchdog, fence, checkpoint, peak_flops_per_s=peak
        ).run()
    except BaseException as error:
        logger.died(error)
        raise
    finally:
        watchdog.at("the end", patient=True)
        logger.close()


def _first_step_to_log(checkpoint: CheckpointReader | None) -> int:
    """The first step whose row is still to be written."""
    return 0 if checkpoint is None else checkpoint.step + (not checkpoint.progress["step_is_unfinished"])
