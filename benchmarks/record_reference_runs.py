"""Write the record of runs from which preflight and a run's start tell how many steps to expect.

python benchmarks/record_reference_runs.py

It reads what is kept of finished runs: the curves that benchmarks/record_curve.py made of run directories, and the
reports of the default command, whose options are the program's defaults. On record are those that reached the usual
target as the program trains by default, on random phases. Each run says from which file its figures are.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from parts import REPOSITORY
from parts.options import RESULTS, run_script
from record_curve import rounded

from nanogpt.config.options import Options, option
from nanogpt.config.train_config import TrainConfig
from nanogpt.plan.reference_runs import ASSET, ReferenceRun
from nanogpt.storage.json_file import read_json, write_json

CURVES = REPOSITORY / "benchmarks" / "curves"
USUAL = {"exit_reason": "target_reached", "phase": "random", "target_loss": 0.099}


@dataclass(frozen=True)
class RecordOptions(Options):
    """Where the record goes."""

    out: str = option(str(REPOSITORY / "nanogpt" / "assets" / ASSET), "where the record goes")


def record(options: RecordOptions) -> int:
    """Write the record."""
    runs = [
        {f.name: run[f.name] for f in fields(ReferenceRun)} | {"from": source}
        for source, run in (*from_curves(), *from_reports())
        if {name: run.get(name) for name in USUAL} == USUAL and "optimizer" in run  # else it was a patch
    ]
    runs.sort(key=lambda run: (run["optimizer"], run["from"]))
    write_json(Path(options.out), {"target_loss": USUAL["target_loss"], "runs": runs})
    print(f"{len(runs)} runs on record")
    return 0


def from_curves() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, what its first line says of the run) for each curve."""
    for path in CURVES.glob("*.jsonl"):
        with path.open() as curve:
            about = json.loads(next(curve))
        yield _name(path), about["options"] | {name: about[name] for name in ("floor", "steps", "exit_reason")}


def from_reports() -> Iterator[tuple[str, dict[str, Any]]]:
    """The same for each report of the default command; what it does not tell are the defaults."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    for path in RESULTS.glob("default_run.*.json"):
        report = read_json(path, of="the results")
        yield _name(path), defaults | report | {"floor": rounded(report["floor"])}


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    run_script(__file__, __doc__, RecordOptions, record)
