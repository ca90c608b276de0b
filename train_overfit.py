"""Make a GPT memorise a text until the target loss is verified.

python train_overfit.py
torchrun --nproc_per_node=8 train_overfit.py --data=my.txt --subset_tokens=4096
"""

import time

LAUNCHED = time.perf_counter()  # before the imports: they are part of what a user waits for

import sys  # noqa: E402

from nanogpt.config.cli import main, parse, without_local_rank  # noqa: E402
from nanogpt.config.train_config import TrainConfig  # noqa: E402
from nanogpt.utils.signals import StopSignals, end_at_once_on_interrupt  # noqa: E402


def run() -> int:
    """Flags -> TrainConfig -> train(); torch is imported only for flags that make sense."""
    end_at_once_on_interrupt()
    stop = StopSignals()
    config = parse(TrainConfig, without_local_rank(sys.argv[1:]), program="train_overfit.py", about=__doc__)
    from nanogpt.training.run import train

    return train(config, launched=LAUNCHED, stop=stop)


if __name__ == "__main__":
    main(run)
