"""One rank that trains, saves, and restores into a new engine: what it reads for that, and what it then holds.

torchrun --standalone --nproc_per_node=3 tests/harness/workers/restore_worker.py CELLS.json FOUND.json
"""

from itertools import chain, count
from pathlib import Path

import torch
from parity_worker import work_on_cells

from nanogpt.acceptance.stages.numerics import build_job, train_step
from nanogpt.config.cli import main
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.optim.ema import EMA
from nanogpt.storage.checkpoint import CheckpointReader, CheckpointWriter
from nanogpt.utils.phases import Phases

STEPS = 2


class CountingReader(CheckpointReader):
    """Counts the values that are read from it."""

    values_read = 0

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.values_read += stop - start
        return super().read(name, start, stop)


def found_in(cell: dict, out_dir: Path, world: World) -> dict:
    """Of each rank the number of values it has read; the sizes of what each holds whole, and which of it is wrong."""
    plan, trained = build_job(TrainConfig(**cell), world)
    writer = CheckpointWriter(out_dir, world, keep=1)  # before the ranks meet: it clears what a kill has left
    average = EMA(trained.local_weights(), 0.5)
    for step in range(STEPS):
        train_step(plan, trained, step, Phases())
        average.update()
    writer.begin(STEPS, [*trained.pieces(), *trained.pieces_like_weights("mean", average.mean)], {})
    failure = writer.commit()
    assert not failure, failure

    path = out_dir / "checkpoints" / f"step_{STEPS:08d}"
    counting, reference = CountingReader(path), CheckpointReader(path)
    _, restored = build_job(TrainConfig(**cell), world)
    restored.restore(counting, updates=STEPS)
    mean = EMA(restored.local_weights(), 0.5).begin()
    restored.read_like_weights("mean", mean, counting)
    held = {
        name: values.detach().reshape(-1)
        for name, values in chain(restored.replicas(), restored.replicas_like_weights("mean", mean))
    }
    wrong = [name for name, v in held.items() if not torch.equal(v, reference.read(name, 0, len(v)).to(v.dtype))]
    return {
        "read": world.gather(counting.values_read),
        "sizes": {name: len(values) for name, values in held.items()},
        "wrong": world.gather(wrong),
    }


def run() -> int:
    """The cells of the file that the first word names, what was found to the second."""
    numbers = count()
    return work_on_cells(lambda cell, world: found_in(cell, Path(f"cell_{next(numbers)}"), world))


if __name__ == "__main__":
    main(run)
