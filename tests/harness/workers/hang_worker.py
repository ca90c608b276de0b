"""train_overfit.py, but the last rank falls asleep: in its rows of step 8 for good, or among its scores for a while.

In the first case the other ranks notice it two seconds later than the last one.

Or it is killed, when all ranks have come and are about to connect.

ASLEEP_IN=batch torchrun --standalone --nproc_per_node=2 tests/harness/workers/hang_worker.py --comm_timeout_s=3
"""

import os
import signal
import time

import train_overfit
from nanogpt.data.windows import Windows
from nanogpt.distributed.watchdog import Watchdog
from nanogpt.distributed.world import World
from nanogpt.evaluate import scorecard

if __name__ == "__main__":
    world, global_batch, recite_text = World.from_env(), Windows.global_batch, scorecard.recite_text
    end = Watchdog._end
    is_last = world.rank == world.size - 1
    naps_s = [21] if is_last else []

    def fetch(self, step, batch_size):
        if step == 7 and is_last:
            time.sleep(1000)
        return global_batch(self, step, batch_size)

    def end_later(self):
        for _ in range(0 if is_last else 4):  # it answers meanwhile
            time.sleep(0.5)
            self._ask(self._tell)
        end(self)

    def recite(*known):
        if naps_s:
            time.sleep(naps_s.pop())
        return recite_text(*known)

    def process_group(self, *_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["ASLEEP_IN"] == "connecting":
        if is_last:
            World.process_group = process_group
    elif os.environ["ASLEEP_IN"] == "batch":
        Windows.global_batch = fetch
        Watchdog._end = end_later
    else:
        scorecard.recite_text = recite
    train_overfit.main(train_overfit.run)
