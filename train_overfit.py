"""Make a GPT memorise a text until the target loss is verified.

python train_overfit.py
torchrun --nproc_per_node=8 train_overfit.py --data=my.txt --subset_tokens=4096
"""

import time

LAUNCHED = time.perf_counter()  # before the imports: they are part of what a user waits for

import sys  # noqa: E402

from nanogpt.commands.train import train  # noqa: E402
from nanogpt.config.cli import main  # noqa: E402


def run() -> int:
    """The run that the command line asks for."""
    return train(sys.argv[1:], launched=LAUNCHED, program="train_overfit.py", about=__doc__ or "")


if __name__ == "__main__":
    main(run)
