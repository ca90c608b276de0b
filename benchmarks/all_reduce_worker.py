"""Times all-reduces of several sizes between the ranks that torchrun starts: {bytes: median seconds} as JSON.

torchrun --nproc_per_node=2 benchmarks/all_reduce_worker.py --times=20 --out=all_reduce.json
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from parts.options import CheckedOptions, run_script

from nanogpt.config.options import option
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import write_json

SIZES = tuple(4**i for i in range(5, 14))  # bytes: 1 KiB to 64 MiB


@dataclass(frozen=True)
class WorkerOptions(CheckedOptions):
    """What to time."""

    times: int = option(20, "all-reduces of each size")
    out: str = option("all_reduce.json", "where the result goes")


def work(options: WorkerOptions) -> int:
    """Every size, the slowest rank's time of each all-reduce."""
    world, found = World.from_env(), {}
    with world.process_group():
        for nbytes in SIZES:
            values = torch.zeros(nbytes // 4, device=world.device)
            dist.all_reduce(values)  # untimed: the first may have to connect the ranks
            found[nbytes] = median(_seconds(world, values) for _ in range(options.times))
    if world.is_first:
        write_json(Path(options.out), found)
    return 0


def _seconds(world: World, values: torch.Tensor) -> float:
    dist.barrier()
    return world.max(world.seconds_of(lambda: dist.all_reduce(values)))[0]


if __name__ == "__main__":
    run_script(__file__, __doc__, WorkerOptions, work)
