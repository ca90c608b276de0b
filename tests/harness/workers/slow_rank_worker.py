"""train_overfit.py on a machine whose rank 1 takes 0.3 s longer over each forward than the others.

torchrun --standalone --nproc_per_node=2 tests/harness/workers/slow_rank_worker.py
"""

import os
import time

import train_overfit
from nanogpt.model.gpt import LMHead

if __name__ == "__main__":
    forward = LMHead.forward

    def slow_forward(self, x):
        time.sleep(0.3 * (os.environ["RANK"] == "1"))
        return forward(self, x)

    LMHead.forward = slow_forward
    train_overfit.main(train_overfit.run)
