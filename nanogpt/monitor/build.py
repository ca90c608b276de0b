"""Which loggers a run has.

logger = open_logger(config, out_dir, world, ids=windows.ids, wandb_run_id="3f1c09aa", losses=[])
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nanogpt.config.train_config import TrainConfig
from nanogpt.data.tokenizer import encoding
from nanogpt.distributed.world import World
from nanogpt.monitor.live_plot import live_page, live_plot, memory_picture
from nanogpt.monitor.loggers import JsonlLogger, Logger, Loggers, NullLogger, PlainLogger
from nanogpt.monitor.terminal import TerminalLogger
from nanogpt.monitor.wandb_logger import open_wandb
from nanogpt.storage.run_dir import METRICS
from nanogpt.token_losses.history import MOST_TOKENS


def open_logger(
    config: TrainConfig, out_dir: Path, world: World, *, ids: Tensor, wandb_run_id: str, losses: Sequence[float]
) -> Logger:
    """The first rank's loggers; nobody hears the others.

    ids: (N,) of the memorised text. losses: of the rows before a resume, nats/token.
    """
    if not world.is_first:
        return NullLogger()
    # A dumb terminal cannot redraw a line.
    redraws = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    person = TerminalLogger(config.target_loss, losses) if redraws else PlainLogger()
    wandb = open_wandb(config, out_dir, wandb_run_id, person.say)
    pictures = [live_plot(out_dir, person.say)]
    if len(ids) <= MOST_TOKENS:
        page = live_page(out_dir, encoding().decode_tokens_bytes(ids.tolist()), person.say)
        pictures += [page, memory_picture(out_dir, person.say)]
    metrics = JsonlLogger(out_dir / METRICS, person.say)
    return Loggers(metrics, person, *pictures, wandb)  # pictures before W&B, which sends them
