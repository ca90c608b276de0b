"""Which checkpoints of a run are intact.

python -m nanogpt checkpoint verify out
"""

from dataclasses import MISSING, dataclass
from typing import Literal

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import user_path
from nanogpt.config.options import Options, option
from nanogpt.storage.checkpoint import CheckpointError, examine


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """What `checkpoint` is asked."""

    action: Literal["verify"] = option(MISSING, "read every byte of every checkpoint and compare it with its manifest")
    run_dir: str = option(MISSING, "directory of a run")


def checkpoint(options: CheckpointOptions) -> int:
    """Print which checkpoints of a run are intact, the newest first; status 1 when the newest is not."""
    examined = list(examine(user_path(options.run_dir, options.run_dir)))
    if not examined:
        raise ConfigError(f"{options.run_dir} holds no checkpoint")
    for name, found in examined:
        print(name, found if isinstance(found, CheckpointError) else "is intact")
    return int(isinstance(examined[0][1], CheckpointError))
