"""Write the record of runs from which preflight and the ETA of a run read how many steps to expect.

python benchmarks/record_reference_runs.py

It reads what is kept of finished runs: the curves that benchmarks/record_curve.py made of run directories. On record
are those that reached the usual target as the program trains by default, on random phases. Each run says from which
file its figures are.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from parts import REPOSITORY
from parts.options import run_script
from record_curve import rounded

from nanogpt.config.options import Options, option
from nanogpt.monitor.eta import FITTED_BELOW, SHORTEST
from nanogpt.plan.reference_runs import ASSET, ReferenceRun
from nanogpt.storage.json_file import write_json

CURVES = REPOSITORY / "benchmarks" / "curves"
NAMES = (*(f.name for f in fields(ReferenceRun) if f.name != "curve"), "steps_below")  # of a run in the record
# Where a curve is kept: from what a model has learnt when it has learnt a little, to where a fit takes over.
LOSSES = [rounded(loss) for loss in np.geomspace(9.6, FITTED_BELOW * 0.099, 16).tolist()]
USUAL = {"exit_reason": "target_reached", "phase": "random", "target_loss": 0.099, "on_plateau": "decay", "ema": 0.97}


@dataclass(frozen=True)
class RecordOptions(Options):
    """Where the record goes."""

    out: str = option(str(REPOSITORY / "nanogpt" / "assets" / ASSET), "where the record goes")


def record(options: RecordOptions) -> int:
    """Write the record."""
    runs = [
        {name: run[name] for name in NAMES}
        for run in from_curves()
        if {name: run.get(name) for name in USUAL} == USUAL and "optimizer" in run  # else it was a patch
    ]
    runs.sort(key=lambda run: (run["optimizer"], run["source"]))
    write_json(Path(options.out), {"target_loss": USUAL["target_loss"], "losses": LOSSES, "runs": runs})
    print(f"{len(runs)} runs on record")
    return 0


def from_curves() -> Iterator[dict[str, Any]]:
    """What the first line of each curve says of its run, and the curve."""
    for path in CURVES.glob("*.jsonl"):
        about, *rows = map(json.loads, path.read_text().splitlines())
        epoch_steps = about["windows_per_epoch"] / about["options"]["batch_size"]
        figures = {name: about[name] for name in ("floor", "steps", "exit_reason")}
        yield (
            about["options"]
            | figures
            | {"source": str(path.relative_to(REPOSITORY)), "steps_below": descent(rows, epoch_steps)}
        )


def descent(rows: list[dict[str, Any]], epoch_steps: float) -> list[int]:
    """The step from which on the mean over an epoch, and as many steps as an ETA averages, stayed below each loss."""
    losses: list[float] = []
    for row in rows:
        losses += [row["loss"]] * (row["step"] - len(losses))
    sums = np.cumsum([0.0, *losses])
    width = round(max(SHORTEST, epoch_steps))
    means = [(sums[i] - sums[max(0, i - width)]) / min(i, width) for i in range(1, len(sums))]
    above = [np.flatnonzero(np.array(means) > loss) for loss in LOSSES]
    return [int(steps[-1]) + 2 if len(steps) else 1 for steps in above]


if __name__ == "__main__":
    run_script(__file__, __doc__, RecordOptions, record)
