"""Train until the target loss is verified.

python train_overfit.py
python -m nanogpt train --data=my.txt --subset_tokens=4096
"""

from collections.abc import Sequence

from nanogpt.config.cli import parse, without_local_rank
from nanogpt.config.train_config import TrainConfig
from nanogpt.utils.signals import StopSignals, end_at_once_on_interrupt


def train(argv: Sequence[str], *, launched: float, program: str, about: str) -> int:
    """Options -> a run -> its exit status. launched: time.perf_counter() when the process began."""
    end_at_once_on_interrupt()
    stop = StopSignals()
    config = parse(TrainConfig, without_local_rank(argv), program=program, about=about)
    from nanogpt.training.run import train  # torch, which takes seconds, is for options that make sense

    return train(config, launched=launched, stop=stop).status
