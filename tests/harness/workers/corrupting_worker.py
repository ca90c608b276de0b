"""train_overfit.py, but once, before step CORRUPT_AT (7), noise gets into the last rank's weights.

torchrun --standalone --nproc_per_node=2 tests/harness/workers/corrupting_worker.py
"""

import os

import torch

import train_overfit
from nanogpt.distributed.world import World
from nanogpt.engine.single import SingleEngine

if __name__ == "__main__":
    world, step = World.from_env(), SingleEngine.step
    to_come = [] if world.rank < world.size - 1 else [int(os.environ.get("CORRUPT_AT", "7"))]

    def noisy_step(self, lr, *figures):
        if to_come:
            to_come[0] -= 1
            if to_come[0] == 0:
                to_come.clear()
                with torch.no_grad():
                    for weight in self.model.parameters():
                        weight += 0.04 * torch.randn_like(weight)
        return step(self, lr, *figures)

    SingleEngine.step = noisy_step
    train_overfit.main(train_overfit.run)
