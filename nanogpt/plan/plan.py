"""What a run will be, resolved and checked before it leaves a trace.

plan = make_plan(TrainConfig(), World.from_env())
"""

from dataclasses import dataclass, replace
from math import floor, inf
from typing import Any, Literal

import torch

from nanogpt.config.errors import ConfigError
from nanogpt.config.fault import check_fault
from nanogpt.config.files import absolute_path
from nanogpt.config.train_config import ResolvedConfig, TrainConfig
from nanogpt.data.dataset import Dataset, load_text, make_dataset
from nanogpt.distributed.hardware import best_dtype, table_peak
from nanogpt.distributed.world import World
from nanogpt.engine.deepspeed_config import DEFAULT_PATH, dtype_of, read_ds_config
from nanogpt.evaluate.recall import possible_recall
from nanogpt.model.fp8 import MULTIPLE
from nanogpt.model.gpt import GPTConfig, flops_per_token
from nanogpt.optim.recipe import recipe_of, resolve_recipe
from nanogpt.plan.memory import Memory, evaluation_rows, predict_memory, shortage, with_copy_on_gpu
from nanogpt.plan.reference_runs import most_steps
from nanogpt.storage.hf import read_hf_shape

COMPILING_S, SAVED_BY_COMPILING, EAGER_MFU = 30.0, 0.33, 0.23  # on an H200: seconds, of a step, of the peak
FIRST_WITH_FP8 = (8, 9)  # compute capability: Ada


@dataclass(frozen=True)
class Plan:
    """All that is known before a process group, a model or a file exists."""

    config: ResolvedConfig
    dataset: Dataset
    deepspeed: dict[str, Any] | None  # what deepspeed.initialize is given, where that is the engine
    memory: Memory  # that a rank is predicted to need at most
    evaluation_rows: int  # windows that this rank can evaluate at once
    warnings: list[str]  # a line for each reason why the run may never reach its target, or not live to


def make_plan(config: TrainConfig, world: World) -> Plan:
    """Resolve config for this world and read the text; raises ConfigError for whatever cannot work."""
    _check_ranks(config, world)
    corpus, ids, open_config = load_text(resolve_recipe(_begun_from(config)))
    resolved, deepspeed = _resolve_machine(open_config, world)
    dataset = make_dataset(corpus, ids, resolved)
    warnings = [_floor_warning(resolved, dataset)] if dataset.floor >= resolved.target_loss else []
    if config.target_recall and (most := possible_recall(dataset.windows, dataset.judged)) < config.target_recall:
        warnings.append(
            f"--target_recall={config.target_recall:g} is above {most:.6g}, the most that is possible: some windows "
            f"begin alike and go on differently: a longer --context_length, or {floor(1e4 * most) / 1e4:g}"
        )
    if short := shortage(resolved, world, deepspeed):
        warnings.append(short)
    if warnings and config.preflight == "strict":
        raise ConfigError(f"--preflight=strict: {' | '.join(warnings)}")
    memory = predict_memory(resolved, world_size=world.size, device_type=world.device.type, deepspeed=deepspeed)
    rows = evaluation_rows(resolved, memory, world)
    return Plan(resolved, dataset, deepspeed, with_copy_on_gpu(resolved, memory, world), rows, warnings)


def _check_ranks(config: TrainConfig, world: World) -> None:
    if config.fault:
        check_fault(config.fault, world.size)
    if config.batch_size < world.size:
        raise ConfigError(
            f"--batch_size={config.batch_size} leaves some of the {world.size} ranks without a window: "
            f"at least {world.size}"
        )
    if config.engine == "single" and world.size > 1:
        raise ConfigError(f"--engine=single cannot train on {world.size} ranks: leave it out, or start one process")
    if config.engine == "ddp" and world.size == 1:
        raise ConfigError("--engine=ddp needs several processes: start with torchrun --nproc_per_node=N")


def _resolve_machine(config: TrainConfig, world: World) -> tuple[ResolvedConfig, dict[str, Any] | None]:
    """config with what it leaves to the machine filled in, and what deepspeed.initialize is given, if that trains."""
    engine = _replicating_engine(world) if config.engine == "auto" else config.engine
    if config.gradient_compression != "none" and engine not in ("ddp", "sharded"):
        raise ConfigError(
            f"--gradient_compression={config.gradient_compression} works with --engine=ddp and sharded, and this is "
            f"{engine}: leave it out"
        )
    if config.head_dtype == "fp8":
        _check_fp8(config, world)
    share = -(-config.batch_size // world.size)
    micro_batch_size = min(config.micro_batch_size or config.batch_size, share)
    found: dict[str, Any] = {"engine": engine, "micro_batch_size": micro_batch_size}
    deepspeed = None
    if engine == "deepspeed":
        deepspeed = _deepspeed_settings(config, micro_batch_size, world)
        stage = deepspeed["zero_optimization"]["stage"]
        found |= {"ds_config": _ds_config_path(config), "zero_stage": stage, "dtype": dtype_of(deepspeed)}
    elif config.dtype == "auto":
        found["dtype"] = best_dtype(world)
    compiles = "false" if config.compile == "auto" else config.compile
    resolved = ResolvedConfig(**(vars(config) | found | {"compile": compiles}))
    if config.compile == "auto" and compiling_pays(resolved, world):
        resolved = replace(resolved, compile="true")
    return resolved, deepspeed


def _check_fp8(config: TrainConfig, world: World) -> None:
    for name in ("context_length", "n_embd"):
        if getattr(config, name) % MULTIPLE:
            raise ConfigError(f"--head_dtype=fp8: --{name}={getattr(config, name)} must be a multiple of {MULTIPLE}")
    cuda = world.device.type == "cuda"
    if world.device.type == "mps" or (cuda and torch.cuda.get_device_capability(world.device) < FIRST_WITH_FP8):
        raise ConfigError(
            f"--head_dtype=fp8 needs an NVIDIA GPU from Ada or Hopper on, and this is {world.device_name()}"
        )


def _replicating_engine(world: World) -> Literal["single", "ddp", "sharded"]:
    """The one that needs no other library and is quickest: a CUDA graph holds a sharded step, but not DDP's."""
    if world.size == 1:
        return "single"
    return "sharded" if world.device.type == "cuda" else "ddp"


def compiling_pays(config: ResolvedConfig, world: World) -> bool:
    """Whether torch.compile can give a run with this config back the time that it takes.

    With figures of benchmarks/LOG.md, for as long a run as any on record.
    """
    if world.device.type != "cuda" or config.zero_stage == 3:  # no gain on a CPU; ZeRO 3 cannot
        return False
    if (peak := table_peak(world.device_name(), config.dtype)) is None:  # a slower one than those, most likely
        return True
    steps = min(most_steps(config), config.max_steps or inf)
    tokens = config.batch_size * config.context_length / world.size
    flops = flops_per_token(GPTConfig.from_options(config), context_length=config.context_length) * tokens
    return SAVED_BY_COMPILING * steps * flops / (EAGER_MFU * peak) > COMPILING_S


def memory_of_engines(plan: Plan, world: World) -> dict[str, Memory | str]:
    """What a rank would need with each engine that world's size allows, or why that engine cannot train this batch."""

    def predict(config: ResolvedConfig, settings: dict[str, Any] | None) -> Memory:
        need = predict_memory(config, world_size=world.size, device_type=world.device.type, deepspeed=settings)
        return with_copy_on_gpu(config, need, world)

    engines: tuple[Literal["single", "ddp", "sharded"], ...] = ("single",) if world.size == 1 else ("ddp", "sharded")
    found: dict[str, Memory | str] = {
        engine: predict(replace(plan.config, engine=engine, zero_stage=None, ds_config=None), None)
        for engine in engines
    }
    for stage in range(4):
        config = replace(plan.config, engine="deepspeed", zero_stage=stage)
        try:
            found[f"ZeRO {stage}"] = predict(config, _deepspeed_settings(config, config.micro_batch_size, world))
        except ConfigError as error:
            found[f"ZeRO {stage}"] = str(error)
    return found


def _begun_from(config: TrainConfig) -> TrainConfig:
    """config with the shape of the model that --init_from names."""
    if config.init_from is None:
        return config
    directory = absolute_path(config.init_from, f"--init_from={config.init_from}")
    shape = read_hf_shape(directory)
    found = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    for name, value in found.items():
        if getattr(config, name) not in (value, getattr(TrainConfig, name)):
            raise ConfigError(
                f"--{name}={getattr(config, name)} is not the {value} of --init_from={config.init_from}: leave it out"
            )
    return replace(config, init_from=str(directory), **found)


def _ds_config_path(config: TrainConfig) -> str:
    return str(absolute_path(config.ds_config, f"--ds_config={config.ds_config}") if config.ds_config else DEFAULT_PATH)


def _deepspeed_settings(config: TrainConfig, micro_batch_size: int, world: World) -> dict[str, Any]:
    if world.device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--engine=deepspeed runs on CUDA and on CPUs, not on {world.device.type}")
    if config.batch_size % world.size:
        raise ConfigError(
            f"--engine=deepspeed needs equal shares: --batch_size={config.batch_size} must be a multiple of the "
            f"{world.size} ranks"
        )
    share = config.batch_size // world.size
    if share % micro_batch_size:
        raise ConfigError(
            f"--engine=deepspeed needs equal micro-batches: --micro_batch_size={micro_batch_size} must divide "
            f"the {share} windows of each rank"
        )
    settings = read_ds_config(
        _ds_config_path(config),
        zero_stage=config.zero_stage,
        dtype=config.dtype,
        best_dtype=best_dtype(world),
        micro_batch_size=micro_batch_size,
        accumulation_steps=share // micro_batch_size,
        device_type=world.device.type,
    )
    zero = settings["zero_optimization"]
    if recipe_of(config).orthogonalises and (
        zero["stage"] == 3 or zero.get("offload_optimizer", {}).get("device") == "cpu"
    ):
        raise ConfigError(
            "--optimizer=muon needs whole matrices on the device: --zero_stage=2 or less, and no offload_optimizer"
        )
    return settings


def _floor_warning(config: ResolvedConfig, dataset: Dataset) -> str:
    """One line for a target that no model can reach."""
    *remedies, last = dataset.floors.remedies(config)
    return (
        f"--target_loss={config.target_loss:g} is below the entropy floor of these windows, {dataset.floor:.4f} "
        f"nats/token: use {', '.join(remedies)}{' or ' * bool(remedies)}{last}"
    )
