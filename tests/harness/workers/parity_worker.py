"""One rank of the parity matrix: trains each cell that it is given for some steps, in one process group.

torchrun --standalone --nproc_per_node=2 tests/harness/workers/parity_worker.py CELLS.json CURVES.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nanogpt.distributed.buckets
import nanogpt.optim.muon
from nanogpt.acceptance.stages.numerics import build_job, train_step
from nanogpt.config.cli import main
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.utils.phases import Phases

nanogpt.distributed.buckets.CHUNK_BYTES = 4_000  # so that this model too is cut into many
nanogpt.optim.muon.CHANNELS = 16  # half of what the cells' matrices have: else none would be taken in groups


def curve(config: TrainConfig, world: World) -> list[tuple[float, float]]:
    """(mean loss over all ranks, gradient norm) of each of config.max_steps steps."""
    plan, engine = build_job(config, world)
    gathered_for_good = [name for name, p in engine.model.named_parameters() if getattr(p, "ds_persist", False)]
    assert not gathered_for_good, "ZeRO 3 would share nothing out"
    return [train_step(plan, engine, step, Phases()) for step in range(config.max_steps)]


def work_on_cells(work: Callable[[dict, World], Any]) -> int:
    """work(cell, world) of each cell of the file that the first word names, in one process group, to the second."""
    world = World.from_env()
    with world.process_group(even_alone=True):
        found = [work(cell, world) for cell in json.loads(Path(sys.argv[1]).read_text())]
    if world.is_first:
        Path(sys.argv[2]).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    main(lambda: work_on_cells(lambda cell, world: curve(TrainConfig(**cell), world)))
