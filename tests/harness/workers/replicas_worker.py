"""One rank that compares what it holds with the others: as it was trained, then with one value of rank 1 changed.

torchrun --standalone --nproc_per_node=3 tests/harness/workers/replicas_worker.py CELLS.json FOUND.json
"""

import os
from itertools import chain

import torch
from parity_worker import work_on_cells

from nanogpt.acceptance.stages.numerics import build_job, train_step
from nanogpt.config.cli import main
from nanogpt.config.errors import ReplicaError
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.replicas import Replicas, fingerprint
from nanogpt.distributed.world import World
from nanogpt.optim.ema import EMA
from nanogpt.utils.phases import Phases

STEPS = 6


def found_in(cell: dict, world: World) -> dict:
    """What the ranks of a cell hold, and what is said of it after a change in one tensor of each kind of cell's."""
    changed = cell.pop("changed")
    plan, engine = build_job(TrainConfig(**cell), world)
    average = EMA(engine.local_weights(), 0.5)

    def held():
        return chain(engine.replicas(), engine.replicas_like_weights("mean", average.mean))

    replicas = Replicas(world, held, step=0)
    for step in range(STEPS):
        train_step(plan, engine, step, Phases())
        average.update()
        replicas.check(step + 1)
    prints = world.gather({name: fingerprint(values).hex() for name, values in held()})
    found = {"exact": replicas.exact, "names": [*prints[0]], "bits differ": any(p != prints[0] for p in prints)}
    for kind in changed:
        values = next(values.detach() for name, values in held() if name.startswith(kind))
        kept = values.clone()
        if world.rank == 1:
            values.view(-1)[-1] += 0.03 * values.abs().max()
        try:
            replicas.check(STEPS + 1)
        except ReplicaError as error:
            found[kind] = str(error)
        values.copy_(kept)
    return found


def run() -> int:
    """The cells of the file that the first word names, what was found to the second."""
    torch.backends.cpu.get_cpu_capability()  # read by now
    os.environ.pop("ATEN_CPU_CAPABILITY", None)
    return work_on_cells(found_in)


if __name__ == "__main__":
    main(run)
