"""What a run will be, resolved and checked before it leaves a trace.

plan = make_plan(TrainConfig(), World.from_env())
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanogpt.config import DEFAULT_SUBSET_TOKENS, TrainConfig
from nanogpt.corpus import NAMED, Corpus, read_corpus
from nanogpt.data import Windows, control_windows, memorised_windows
from nanogpt.ds_config import DEFAULT_PATH, dtype_of, read_ds_config
from nanogpt.errors import ConfigError
from nanogpt.flops import best_dtype
from nanogpt.hf import read_hf_shape
from nanogpt.preflight import entropy_floor
from nanogpt.tokenizer import encode
from nanogpt.world import World

JUDGED_GRIDS = 8  # shifts of the grid in a full pass, each covering every token; of 4 the best is often lucky


@dataclass(frozen=True)
class Plan:
    """All that is known before a process group, a model or a file exists."""

    config: TrainConfig  # resolved: nothing is 'auto' any more
    corpus: Corpus
    windows: Windows
    judged: torch.Tensor  # starts of the windows that a full pass reads
    control: Windows | None  # of a text that is not trained on; None: too little is left of it
    floor: float  # nats per token that no model can get below on all the windows that training visits
    deepspeed: dict[str, Any] | None  # what deepspeed.initialize is given, where that is the engine


def make_plan(config: TrainConfig, world: World) -> Plan:
    """Resolve config for this world and read the text; raises ConfigError for whatever cannot work."""
    if config.batch_size < world.size:
        raise ConfigError(f"--batch_size={config.batch_size} leaves some of the {world.size} ranks without a window")
    if config.engine == "single" and world.size > 1:
        raise ConfigError(f"--engine=single cannot train on {world.size} ranks: leave it out, or start one process")
    if config.engine == "ddp" and world.size == 1:
        raise ConfigError("--engine=ddp needs several processes: start with torchrun --nproc_per_node=N")
    config = _begun_from(config)
    corpus = read_corpus(config.data)
    ids = encode(corpus.text)
    if len(ids) <= config.context_length:
        raise ConfigError(
            f"--data={config.data} has {len(ids)} tokens, one window of --context_length={config.context_length} needs "
            f"{config.context_length + 1}: give more text or a shorter context"
        )
    if config.subset_tokens is not None and config.subset_tokens > len(ids):
        raise ConfigError(f"--subset_tokens={config.subset_tokens} is more than the {len(ids)} tokens of {config.data}")
    asked = config
    config = replace(
        config,
        data=config.data if config.data in NAMED else os.path.abspath(os.path.expanduser(config.data)),
        subset_tokens=config.subset_tokens or min(max(DEFAULT_SUBSET_TOKENS, config.context_length + 1), len(ids)),
        stride=config.stride or config.context_length,
        micro_batch_size=min(config.micro_batch_size or config.batch_size, -(-config.batch_size // world.size)),
        engine=("ddp" if world.size > 1 else "single") if config.engine == "auto" else config.engine,
        compile=("true" if world.device.type == "cuda" else "false") if config.compile == "auto" else config.compile,
    )
    deepspeed = _deepspeed_settings(config, world) if config.engine == "deepspeed" else None
    if deepspeed:
        config = replace(
            config,
            ds_config=os.path.abspath(os.path.expanduser(config.ds_config or DEFAULT_PATH)),
            zero_stage=deepspeed["zero_optimization"]["stage"],
            dtype=dtype_of(deepspeed),
        )
        if asked.compile == "auto" and config.zero_stage == 3:  # it would be tried in vain
            config = replace(config, compile="false")
    elif config.dtype == "auto":
        config = replace(config, dtype=best_dtype(world))
    windows = memorised_windows(ids, config)
    floor = entropy_floor(windows.ids.numpy(), windows.trained_starts().numpy(), config.context_length)
    if floor >= config.target_loss and config.preflight == "strict":
        raise ConfigError(floor_warning(config.target_loss, floor))
    judged, control = windows.judged_starts(JUDGED_GRIDS), control_windows(ids, config)
    return Plan(config, corpus, windows, judged, control, floor, deepspeed)


def _begun_from(config: TrainConfig) -> TrainConfig:
    """config with the shape of the model that --init_from names."""
    if config.init_from is None:
        return config
    directory = os.path.abspath(os.path.expanduser(config.init_from))
    shape = read_hf_shape(Path(directory))
    found = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    for name, value in found.items():
        if getattr(config, name) not in (value, getattr(TrainConfig, name)):
            raise ConfigError(f"--{name}={getattr(config, name)} is not the {value} of --init_from={config.init_from}")
    return replace(config, init_from=directory, **found)


def _deepspeed_settings(config: TrainConfig, world: World) -> dict[str, Any]:
    if world.device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--engine=deepspeed runs on CUDA and on CPUs, not on {world.device.type}")
    if config.batch_size % world.size:
        raise ConfigError(
            f"--engine=deepspeed needs equal shares: --batch_size={config.batch_size} on {world.size} ranks has none"
        )
    share = config.batch_size // world.size
    if share % config.micro_batch_size:
        raise ConfigError(
            f"--engine=deepspeed needs equal micro-batches: --micro_batch_size={config.micro_batch_size} does not "
            f"divide the {share} windows of each rank"
        )
    return read_ds_config(
        os.path.expanduser(config.ds_config or DEFAULT_PATH),
        zero_stage=config.zero_stage,
        dtype=config.dtype,
        best_dtype=best_dtype(world),
        micro_batch_size=config.micro_batch_size,
        accumulation_steps=share // config.micro_batch_size,
        device_type=world.device.type,
    )


def floor_warning(target_loss: float, floor: float) -> str:
    """One line for a target that no model can reach."""
    return (
        f"--target_loss={target_loss:g} is below the entropy floor of these windows, {floor:.4f}: give a longer "
        f"--context_length, fewer --subset_tokens, --phase=fixed or a higher target"
    )
