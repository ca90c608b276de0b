"""What several processes and their machines must fit, beside what a plan checks, before a run leaves a trace.

refuse_copies()
check_agreement(plan, world)        # on every rank, once all have met
"""

import os
from dataclasses import asdict

from nanogpt.config.errors import ConfigError, RunError
from nanogpt.config.train_config import ResolvedConfig
from nanogpt.distributed.hardware import free_host_bytes
from nanogpt.distributed.health_check import check_health
from nanogpt.distributed.world import World
from nanogpt.model.gpt import GPTConfig
from nanogpt.plan.memory import FP32
from nanogpt.plan.plan import Plan
from nanogpt.storage.provenance import what_computes
from nanogpt.utils.console import say
from nanogpt.utils.format import counted, gigabytes

# Launchers that tell their processes nothing which torch understands: how many there are, and which of them this is.
LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
}


def refuse_copies() -> None:
    """Refuse to be one of several processes that know nothing of each other: each would train alone, in one out_dir.

    Raises ConfigError in the first of them, RunError in the others.
    """
    for launcher, (size, rank) in LAUNCHERS.items():
        if "WORLD_SIZE" not in os.environ and (count := os.environ.get(size, "1")) != "1":
            why = (
                f"{launcher} starts this command {count} times without torchrun: let {launcher} start one torchrun on "
                f"each node, as slurm/train.sh does, or set WORLD_SIZE=1 to make each process a run of its own"
            )
            if os.environ.get(rank, "0") != "0":
                raise RunError(why, status=2, is_told=True)
            raise ConfigError(why)


def check_agreement(plan: Plan, world: World) -> None:
    """Refuse to train when a rank has another text, option, code or library than the first: it would hang, or spoil."""
    everyone = world.gather(
        what_computes()  # first of all: other code may have other options
        | asdict(plan.config)
        | {"SHA-256 of the text": plan.dataset.corpus.sha256, "DeepSpeed settings": plan.deepspeed, "ds_config": None}
    )
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in first | other:
            mine, its = first.get(name), other.get(name)
            if mine != its:
                raise ConfigError(f"rank {rank} has {name} {its}, rank 0 {mine}: make them the same")


def require_room(config: ResolvedConfig, world: World) -> None:
    """Refuse weights that this machine has no room for: whatever the engine, every rank builds the whole model.

    What is needed beyond them is foreseen, not known, and warned of (nanogpt/plan/memory.py).
    """
    need, free = world.local_size * GPTConfig.from_options(config).num_parameters * FP32, free_host_bytes()
    if free is not None and need > free:
        raise ConfigError(
            f"the weights alone are {gigabytes(need)} on {counted(world.local_size, 'rank')}, {gigabytes(free)} are "
            f"free here: use a smaller model{', or fewer ranks on this machine' * (world.local_size > 1)}"
        )


def examine_ranks(config: ResolvedConfig, world: World) -> None:
    """Tell of ranks that are slow or wrong, as --health asks. Raises ConfigError on every rank when it is strict."""
    if config.health == "off":
        return
    findings = check_health(world, dtype=config.dtype, say=say)
    if findings and config.health == "strict":
        raise ConfigError(f"--health=strict: {' | '.join(findings)}")
    for finding in findings if world.is_first else ():
        say(f"warning: {finding}")
