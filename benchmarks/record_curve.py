"""Keep what benchmarks/eta_backtest.py needs of a finished run, in a few kilobytes.

python benchmarks/record_curve.py runs/mine benchmarks/curves/mine.jsonl --held_out=true

The first line says what the run was, the others are its rows.
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from parts.options import run_script
from parts.runs import Trained

from nanogpt.config.options import Options, option
from nanogpt.config.train_config import TrainConfig
from nanogpt.data.windows import JUDGED_GRIDS, Windows

OPTIONS = (
    "subset_tokens", "context_length", "stride", "phase", "n_layer", "n_head", "n_embd", "batch_size", "learning_rate",
    "optimizer", "on_plateau", "ema", "seed", "target_loss", "log_every", "dtype",
)  # fmt: skip
KEPT = ("step", "loss", "lr", "full_pass_loss")  # of a row


@dataclass(frozen=True)
class RecordOptions(Options):
    """What to keep, and where."""

    run: str = option(MISSING, "a run directory with its report.json")
    out: str = option(MISSING, "the curve's file")
    text: str = option("builtin", "what was memorised")
    held_out: Literal["true", "false"] = option("true", "false: the estimator was designed on this curve")


def record(options: RecordOptions) -> int:
    """The run in two kinds of line."""
    run = Trained.read(Path(options.run))
    config = TrainConfig(**{name: run.config["config"][name] for name in OPTIONS})
    windows = Windows(
        torch.arange(config.subset_tokens),
        context_length=config.context_length, stride=config.stride, phase=config.phase, seed=config.seed,
    )  # fmt: skip
    about = {
        "held_out": options.held_out == "true",
        "text": options.text,
        "options": {name: getattr(config, name) for name in OPTIONS},
        "floor": rounded(run.report["floor"]),
        "windows_per_epoch": windows.per_epoch,
        "judged_windows": len(windows.judged_starts(JUDGED_GRIDS)),
        "steps": run.report["steps"],
        "exit_reason": run.report["exit_reason"],
    }
    rows = [row for row in run.rows if row["loss"] is not None]
    kept = [{key: rounded(row[key]) for key in KEPT if row[key] is not None} for row in rows]
    Path(options.out).write_text("".join(json.dumps(line) + "\n" for line in (about, *kept)))
    return 0


def rounded(figure: Any) -> Any:
    """Five digits of a fraction."""
    return float(f"{figure:.5g}") if isinstance(figure, float) else figure


if __name__ == "__main__":
    run_script(__file__, __doc__, RecordOptions, record)
