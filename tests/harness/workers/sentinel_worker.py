"""One rank that trains with gradients checked and without, then with one rank's gradient wrong.

torchrun --standalone --nproc_per_node=3 tests/harness/workers/sentinel_worker.py CELLS.json FOUND.json
"""

from contextlib import contextmanager
from dataclasses import replace

from parity_worker import work_on_cells

from nanogpt.acceptance.stages.numerics import build_job
from nanogpt.config.cli import main
from nanogpt.config.errors import ReplicaError
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.replicas import Replicas
from nanogpt.distributed.world import World
from nanogpt.monitor.sentinel import Sentinel
from nanogpt.training.trainer import micro_batches
from nanogpt.utils.phases import Phases

STEPS = 4
WRONG = "transformer.h.0.mlp.c_proj.weight"  # whose values add up to zero, as its output is normalised


class Run:
    """A tiny one, whose steps are the trainer's."""

    def __init__(self, cell: dict, world: World) -> None:
        self.plan, self.engine = build_job(TrainConfig(**cell), world)
        self.world, self.step = world, 0
        replicas = Replicas(world, self.engine.replicas, step=0)
        self.sentinel = Sentinel(self.engine, replicas, self.plan.config, Phases(), step=0)

    def batches(self, rank: int) -> list:
        """Of a rank in the step to come."""
        world = replace(self.world, rank=rank)
        return micro_batches(self.plan.config, self.plan.dataset.windows, world, self.step)

    def train_step(self) -> tuple[float, float]:
        """Its loss sum and gradient norm."""
        number, batches = self.step + 1, self.batches(self.world.rank)
        with self.sentinel.listening(number):
            for batch in batches:
                self.engine.forward_backward(batch, is_last=batch is batches[-1])
        self.sentinel.check_gradient(number, lambda rank: self.batches(rank)[-1])
        result = self.engine.step(self.plan.config.learning_rate)
        self.step = number
        self.sentinel.compare_replicas(number)
        return result.loss_sum, result.grad_norm

    @contextmanager
    def wrong(self, rank: int, *, times: int):
        """A rank's gradient of one tensor is half as large again, so many times."""
        left = [times if self.world.rank == rank else 0]

        def off(gradient):
            left[0] -= 1
            return gradient * 1.5 if left[0] >= 0 else None

        handle = self.engine.model.get_parameter(WRONG).register_hook(off)
        yield
        handle.remove()


def found_in(cell: dict, world: World) -> dict:
    """Curves with and without checks; what is said of a gradient that is wrong for good, and once."""
    checked = Run(cell | {"gradient_check_every": 1, "replica_check_every": 1}, world)
    unchecked = Run(cell | {"gradient_check_every": None, "replica_check_every": None}, world)
    found = {name: [run.train_step() for _ in range(STEPS)] for name, run in (("checked", checked), ("not", unchecked))}
    windows = len(checked.batches(1))
    # The last: rank 1's own of its last micro-batch is right, and what it computes again of rank 0's is not.
    for name, times in (("for good", 10**6), ("once", windows), ("again", windows + 1)):
        with checked.wrong(1, times=times):
            try:
                checked.train_step()
                found[name] = ""
            except ReplicaError as error:
                found[name] = str(error)
        checked = Run(cell | {"gradient_check_every": 1}, world)  # its gradient was left half exchanged
    return found


if __name__ == "__main__":
    main(lambda: work_on_cells(found_in))
