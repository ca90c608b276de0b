"""Stage d: does every engine, and every rank by itself, train along the curve that is on record?

curves = measure_engine(world, "ddp", zero_stage=None)      # the fixed job in fp32 and in bf16, on all ranks
curves = measure_alone(world)                               # the same on one rank, without the others
judge_numerics(curves)

A loss that falls proves little: one rank's gradient may be missing, or the rate a hundredth too high. The job is the
same at any number of ranks, and one process has trained it before (assets/golden_curves.json, written by
benchmarks/golden_curves.py). Where all ranks together leave the curve, the ranks alone tell whose fault it is.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from math import isfinite
from typing import Any, Literal

import torch

from nanogpt.acceptance.verdict import Check, Verdict
from nanogpt.config.errors import ConfigError, ReplicaError, one_line
from nanogpt.config.fault import Fault
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.faults import InjectedFault
from nanogpt.distributed.hardware import cpu_has_bf16
from nanogpt.distributed.replicas import Replicas
from nanogpt.distributed.world import World
from nanogpt.engine import Engine, EngineOptions, build_engine
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.plan.plan import Plan, make_plan
from nanogpt.storage.json_file import JsonFile, from_json, key
from nanogpt.training.trainer import micro_batches
from nanogpt.utils.phases import Phases

STEPS = 30
EMULATED_STEPS = 5  # of bf16 on a CPU without instructions for it, which takes twenty times as long
LENGTHS = {"fp32": (STEPS,), "bf16": (STEPS, EMULATED_STEPS)}
ON_RECORD = ("cpu",)  # kinds of devices that the bands come from
UNRECORDED = 10.0  # bands: how far off the curve of another kind may be until it is certainly wrong
DTYPES: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
# 384 windows are shared out evenly over 2^n and 3 x 2^n ranks, up to 128 and 384, as DeepSpeed wants it.
JOB: dict[str, Any] = {
    "data": "builtin", "subset_tokens": 2048, "context_length": 8, "batch_size": 384, "n_layer": 2, "n_head": 4,
    "n_embd": 64, "block_size": 8, "learning_rate": 6e-4, "compile": "false", "ema": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one training of the fixed job gave; a figure that is not finite is None."""

    dtype: str = key("fp32 or bf16")
    kind: str = key("what it was trained on: cpu, cuda or mps")
    engine: str = key("single, ddp, sharded, or ZeRO 0 to 3")
    rank: int | None = key("the rank that trained it alone; null: all together", default=None)
    losses: tuple[float | None, ...] = key("of each step, before its update, over all ranks, nats/token")
    grad_norms: tuple[float | None, ...] = key("of each step, over all parameters and ranks")
    failure: str = key("why there is none, or what the ranks hold unlike after it", default="")

    @property
    def name(self) -> str:
        """'fp32, ddp', 'bf16, rank 3 alone'."""
        return f"{self.dtype}, {self.engine if self.rank is None else f'rank {self.rank} alone'}"


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One process's curve of the fixed job, and how far right computations have strayed from it."""

    losses: tuple[float, ...] = key("of each step, nats/token")
    grad_norms: tuple[float, ...] = key("of each step")
    loss_band: tuple[float, ...] = key("how far a loss may be from it, as a share of it")
    grad_norm_band: tuple[float, ...] = key("how far a gradient norm may be from it, as a share of it")


@dataclass(frozen=True, kw_only=True)
class GoldenCurves(JsonFile):
    """assets/golden_curves.json."""

    fp32: Golden = key("the job in fp32")
    bf16: Golden = key("the job in bf16")


@cache
def golden(dtype: str) -> Golden:
    """The curve on record in dtype."""
    found: Golden = getattr(from_json(GoldenCurves, json.loads(_asset())), dtype)
    return found


def golden_sha256() -> str:
    """Of the curves on record: verdicts are as these have it."""
    return hashlib.sha256(_asset()).hexdigest()


def _asset() -> bytes:
    return (files("nanogpt") / "assets" / "golden_curves.json").read_bytes()


def job_config(**options: Any) -> TrainConfig:
    """The fixed job, with what differs between its cells."""
    return TrainConfig(**(JOB | options))


def build_job(config: TrainConfig, world: World) -> tuple[Plan, Engine]:
    """The plan of config and its engine, around a model whose vocabulary is the subset's own.

    50,257 logits a position would take longer than all else that a small model does. Raises ConfigError.
    """
    plan = make_plan(config, world)
    resolved, windows = plan.config, plan.dataset.windows
    tokens, windows.ids = windows.ids.unique(return_inverse=True)
    plan = replace(plan, dataset=replace(plan.dataset, windows=windows.on(world.device)))
    shape = replace(GPTConfig.from_options(resolved), vocab_size=len(tokens))
    torch.manual_seed(resolved.seed)
    options = EngineOptions(
        resolved.dtype, resolved.optimizer, compile=False, micro_batches=micro_batches(resolved, windows, world, 0),
        deepspeed=plan.deepspeed, gradient_compression=resolved.gradient_compression, cuda_graphs=False,
    )  # fmt: skip
    return plan, build_engine(resolved.engine, GPT(shape), world, options)


def train_step(plan: Plan, engine: Engine, step: int, phases: Phases) -> tuple[float, float]:
    """One update -> (mean loss over all ranks, gradient norm). step: counted from 0."""
    config = plan.config
    batches = micro_batches(config, plan.dataset.windows, engine.world, step)
    with phases("forward and backward", step + 1):
        for batch in batches:
            engine.forward_backward(batch, is_last=batch is batches[-1])
    with phases("update", step + 1):
        result = engine.step(config.learning_rate)
    return result.loss_sum / batches[0].step_tokens, result.grad_norm


def measure_engine(
    world: World, engine: str, zero_stage: int | None = None, fault: Fault | None = None
) -> tuple[Curve, ...]:
    """The fixed job on all ranks together, in each precision."""
    name = engine if zero_stage is None else f"ZeRO {zero_stage}"
    curves = []
    for dtype in DTYPES:
        try:
            config = job_config(engine=engine, zero_stage=zero_stage, dtype=dtype)
            curves.append(train_curve(config, world, name, fault))
        except ConfigError as error:  # on every rank: it cannot train on so many
            curves.append(
                Curve(
                    dtype=dtype, kind=world.device.type, engine=name, losses=(), grad_norms=(), failure=one_line(error)
                )
            )
    return tuple(curves)


def measure_alone(world: World, fault: Fault | None = None) -> tuple[Curve, ...]:
    """The fixed job on this rank by itself, in each precision. world: its place; no other rank is needed."""
    alone = replace(world, rank=0, size=1)
    fault = replace(fault, rank=0) if fault and fault.rank == world.rank else None
    mine = [train_curve(job_config(engine="single", dtype=dtype), alone, "single", fault) for dtype in DTYPES]
    return tuple(replace(curve, rank=world.rank) for curve in mine)


def steps_in(dtype: str, world: World) -> int:
    """How long a curve in dtype is trained on world's devices: as the slowest of them can. Every rank must call."""
    is_slow = dtype == "bf16" and world.device.type == "cpu" and not cpu_has_bf16()
    return EMULATED_STEPS if any(world.max(float(is_slow))) else STEPS


def train_curve(
    config: TrainConfig, world: World, name: str, fault: Fault | None = None, steps: int | None = None
) -> Curve:
    """One training of the job, as the engine called name. steps: how long; None: as acceptances do."""
    plan, engine = build_job(config, world)
    phases = Phases()
    if fault and world.rank == fault.rank:
        phases.listen(InjectedFault(fault, engine.model, engine.local_weights()))
    replicas = Replicas(world, engine.replicas, step=0)
    try:
        steps = steps or steps_in(config.dtype, world)
        figures = [train_step(plan, engine, step, phases) for step in range(steps)]
        failure = ""
        try:
            replicas.check(steps)
        except ReplicaError as error:
            failure = one_line(error).partition(";")[0]
    finally:
        engine.close()
    losses, norms = zip(*figures, strict=True)
    return Curve(
        dtype=config.dtype, kind=world.device.type, engine=name, losses=_finite(losses), grad_norms=_finite(norms),
        failure=failure,
    )  # fmt: skip


def judge_numerics(curves: Sequence[Curve], reference: Callable[[str], Golden] = golden) -> list[Check]:
    """A check for each precision and engine, and one for all ranks alone. reference: the curve on record of a dtype."""
    checks = [_judge_together(curve, reference(curve.dtype)) for curve in curves if curve.rank is None]
    for dtype in DTYPES:
        if alone := [curve for curve in curves if curve.rank is not None and curve.dtype == dtype]:
            checks.append(_judge_alone(alone, reference(dtype)))
    return checks


def verdict_of(curve: Curve, on_record: Golden) -> tuple[Verdict, str]:
    """Of one curve by itself, and why; UNKNOWN where an engine cannot train, or of a device that no band comes from."""
    if not curve.losses and curve.rank is None:
        return Verdict.UNKNOWN, curve.failure
    found = _what_is_wrong(curve, on_record)
    if found and not curve.failure and _may_be_the_device(curve, on_record):
        return Verdict.UNKNOWN, f"{found}; no curve of such a device is on record yet"
    wrong = "; ".join(filter(None, [found, curve.failure]))
    return (Verdict.FAIL, wrong) if wrong else (Verdict.PASS, f"{_within(curve, on_record)} of its band")


def _judge_together(curve: Curve, on_record: Golden) -> Check:
    verdict, said = verdict_of(curve, on_record)
    if verdict is Verdict.UNKNOWN:
        return Check.unknown(curve.name, said)
    return Check.of(
        verdict is Verdict.FAIL, name=curve.name, found=said,
        expected=f"{len(curve.losses)} losses and gradient norms within their bands, and all ranks alike",
    )  # fmt: skip


def _judge_alone(curves: Sequence[Curve], on_record: Golden) -> Check:
    name = f"{curves[0].dtype}, each rank alone"
    judged = [(curve, *verdict_of(curve, on_record)) for curve in curves]
    wrong = {curve.rank: said for curve, verdict, said in judged if verdict is Verdict.FAIL}
    unsure = [said for _, verdict, said in judged if verdict is Verdict.UNKNOWN]
    if unsure and not wrong:
        return Check.unknown(name, unsure[0])
    most = "" if wrong else max(_within(curve, on_record) for curve in curves)
    return Check.of(
        [rank for rank in wrong if rank is not None],
        name=name,
        found="; ".join(f"rank {rank}: {said}" for rank, said in wrong.items()) or f"{most} of the band at most",
        expected="the same curve, computed by one rank without the others",
    )


def _what_is_wrong(curve: Curve, on_record: Golden) -> str:
    """The same as departure of a curve that is whole; '' where nothing is."""
    if not len(curve.losses) == len(curve.grad_norms) in LENGTHS[curve.dtype]:
        return f"it has {len(curve.losses)} losses and {len(curve.grad_norms)} gradient norms, not {STEPS}"
    return departure(curve, on_record)


def deviations(curve: Curve, on_record: Golden) -> Iterator[tuple[str, int, float, float]]:
    """('loss' or 'gradient norm', step from 1 on, how far it is off as a share, how far it may be), by step."""
    for step, (loss, norm) in enumerate(zip(curve.losses, curve.grad_norms, strict=True)):
        for what, value, right, band in (
            ("loss", loss, on_record.losses[step], on_record.loss_band[step]),
            ("gradient norm", norm, on_record.grad_norms[step], on_record.grad_norm_band[step]),
        ):
            yield what, step + 1, float("inf") if value is None else value / right - 1, band


def departure(curve: Curve, on_record: Golden) -> str:
    """Where a curve leaves its band, in one line; '' where it does not."""
    for what, step, off, band in deviations(curve, on_record):
        if not abs(off) <= band:
            if not isfinite(off):
                return f"the {what} of step {step} is not finite"
            return f"the {what} of step {step} is {off:+.3g} of itself off, the band is {band:.3g}"
    return ""


def _may_be_the_device(curve: Curve, on_record: Golden) -> bool:
    """Whether a curve outside its band may be a right one, of a kind of device that the bands do not come from."""
    return curve.kind not in ON_RECORD and len(curve.losses) in LENGTHS[curve.dtype] and all(
        abs(off) <= UNRECORDED * band for _, _, off, band in deviations(curve, on_record)
    )  # fmt: skip


def _within(curve: Curve, on_record: Golden) -> str:
    """The largest share of its band that a curve takes."""
    return f"{max(abs(off) / band for _, _, off, band in deviations(curve, on_record)):.0%}"


def _finite(values: Sequence[float]) -> tuple[float | None, ...]:
    return tuple(value if isfinite(value) else None for value in values)
