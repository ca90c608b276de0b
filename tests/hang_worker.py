"""train_overfit.py, but the last rank falls asleep while it fetches its rows of step 8.

torchrun --standalone --nproc_per_node=2 tests/hang_worker.py --comm_timeout_s=3
"""

import time

import train_overfit
from nanogpt.data import Windows
from nanogpt.world import World

if __name__ == "__main__":
    world, global_batch = World.from_env(), Windows.global_batch

    def fetch(self, step, batch_size):
        if step == 7 and world.rank == world.size - 1:
            time.sleep(1000)
        return global_batch(self, step, batch_size)

    Windows.global_batch = fetch
    train_overfit.main(train_overfit.run)
