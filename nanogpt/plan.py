"""What a run will be, resolved and checked before it leaves a trace.

plan = make_plan(TrainConfig(), World.from_env())
"""

import os
from dataclasses import dataclass, replace

import torch

from nanogpt.config import DEFAULT_SUBSET_TOKENS, TrainConfig
from nanogpt.corpus import NAMED, Corpus, read_corpus
from nanogpt.data import Windows
from nanogpt.errors import ConfigError
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
    floor: float  # nats per token that no model can get below on all the windows that training visits


def make_plan(config: TrainConfig, world: World) -> Plan:
    """Resolve config for this world and read the text; raises ConfigError for whatever cannot work."""
    if config.batch_size < world.size:
        raise ConfigError(f"--batch_size={config.batch_size} leaves some of the {world.size} ranks without a window")
    if config.engine == "single" and world.size > 1:
        raise ConfigError(f"--engine=single cannot train on {world.size} ranks: use --engine=ddp, or start one process")
    if config.engine == "ddp" and world.size == 1:
        raise ConfigError("--engine=ddp needs several processes: start with torchrun --nproc_per_node=N")
    corpus = read_corpus(config.data)
    ids = encode(corpus.text)
    if len(ids) <= config.context_length:
        raise ConfigError(
            f"--data={config.data} has {len(ids)} tokens, one window of --context_length={config.context_length} needs "
            f"{config.context_length + 1}: give more text or a shorter context"
        )
    if config.subset_tokens is not None and config.subset_tokens > len(ids):
        raise ConfigError(f"--subset_tokens={config.subset_tokens} is more than the {len(ids)} tokens of {config.data}")
    config = replace(
        config,
        data=config.data if config.data in NAMED else os.path.abspath(os.path.expanduser(config.data)),
        subset_tokens=config.subset_tokens or min(max(DEFAULT_SUBSET_TOKENS, config.context_length + 1), len(ids)),
        stride=config.stride or config.context_length,
        micro_batch_size=min(config.micro_batch_size or config.batch_size, -(-config.batch_size // world.size)),
        engine=("ddp" if world.size > 1 else "single") if config.engine == "auto" else config.engine,
        dtype=world.best_dtype() if config.dtype == "auto" else config.dtype,
        compile=("true" if world.device.type == "cuda" else "false") if config.compile == "auto" else config.compile,
    )
    windows = Windows(
        torch.tensor(ids[: config.subset_tokens]),
        context_length=config.context_length, stride=config.stride, phase=config.phase, seed=config.seed,
    )  # fmt: skip
    floor = entropy_floor(windows.ids.numpy(), windows.trained_starts().numpy(), config.context_length)
    if floor >= config.target_loss and config.preflight == "strict":
        raise ConfigError(floor_warning(config.target_loss, floor))
    return Plan(config, corpus, windows, windows.judged_starts(JUDGED_GRIDS), floor)


def floor_warning(target_loss: float, floor: float) -> str:
    """One line for a target that no model can reach."""
    return (
        f"--target_loss={target_loss:g} is below the entropy floor of these windows, {floor:.4f}: give a longer "
        f"--context_length, fewer --subset_tokens, --phase=fixed or a higher target"
    )
