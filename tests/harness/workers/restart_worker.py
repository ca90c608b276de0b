"""One rank that is killed in its first attempt, once it has met the others, and is late in its second.

torchrun --standalone --nproc_per_node=2 --max_restarts=1 tests/harness/workers/restart_worker.py
"""

import os
import signal
import time

from nanogpt.distributed.world import World

if __name__ == "__main__":
    world = World.from_env()
    restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if restarted and not world.is_first:
        time.sleep(3)  # the first rank looks for this one's address meanwhile
    with world.process_group():
        (ranks,) = world.sum(1.0)
        if not restarted and not world.is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        world.sum(1.0)
        if world.is_first:
            print(f"restarted {restarted}, {ranks:.0f} ranks met")
