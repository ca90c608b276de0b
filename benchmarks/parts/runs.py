"""A run of train_overfit.py in processes of its own, and what its run directory says.

run = train("--max_steps=20", *SHORT_TEXT, ranks=2)
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.report import Report
from parts import REPOSITORY

SHORT_TEXT = ("--subset_tokens=129", "--log_every=1")  # scoring it at the end takes less time than the steps


@dataclass(frozen=True)
class Trained:
    """What a run directory says; report without scores where another version has scored it."""

    report: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, out_dir: Path) -> "Trained":
        """Of a run that has ended. Raises ConfigError where a file is missing or damaged, NewerFormatError."""
        return cls(
            report=Report.read(out_dir / "report.json", of="a run").to_json(),
            config=RunInfo.read(out_dir / "config.json", of="a run").to_json(),
            rows=[json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()],
        )

    @property
    def step_tokens(self) -> int:
        """Targets in a global batch."""
        return self.config["config"]["batch_size"] * self.config["config"]["context_length"]

    def circumstances(self) -> dict[str, Any]:
        """What a figure depends on beside what is measured."""
        return {key: self.report[key] for key in ("dtype", "steps", "device")} | {"versions": self.config["versions"]}


def launcher(ranks: int) -> list[str]:
    """The words before a script that start it on as many ranks."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(several if ranks > 1 else [])]


def train(*words: str, ranks: int = 1, threads: int | None = None) -> Trained:
    """Train on this machine's cores, in a directory that is removed again.

    threads: of each rank; None: the cores, or as many as OMP_NUM_THREADS names, are shared out.
    """
    with tempfile.TemporaryDirectory() as directory:
        return train_in(Path(directory, "out"), *words, ranks=ranks, threads=threads)


def train_in(out_dir: Path, *words: str, ranks: int = 1, threads: int | None = None) -> Trained:
    """The same in out_dir, which stays. Raises SystemExit where it neither reaches its target nor spends its budget."""
    threads = threads or max(1, torch.get_num_threads() // ranks)
    report = out_dir / "report.json"
    before = report.stat().st_mtime_ns if report.exists() else 0  # of a run that goes on
    done = subprocess.run(
        # Without W&B, whose thread and service take time and memory, and may send what is a measurement.
        [*launcher(ranks), REPOSITORY / "train_overfit.py", "--wandb=disabled", *words, f"--out_dir={out_dir}"],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    run = Trained.read(out_dir) if report.exists() and report.stat().st_mtime_ns != before else None
    statuses = {"target_reached": (0,), "max_steps": (1,) if ranks > 1 else (3,)}  # torchrun makes 1 of 3
    if run is None or done.returncode not in statuses.get(run.report["exit_reason"], ()):
        raise SystemExit(f"{' '.join(words)} left with status {done.returncode}:\n{done.stderr}")
    return run


def all_reduces(ranks: int, times: int) -> dict[str, float]:
    """Median seconds of all-reduces between as many ranks, by their bytes. Raises SystemExit where they fail."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "all_reduce.json")
        worker = [REPOSITORY / "benchmarks" / "all_reduce_worker.py", f"--times={times}", f"--out={out}"]
        done = subprocess.run(
            [*launcher(ranks), *worker], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if not out.exists():
            raise SystemExit(f"all-reduces of {ranks} ranks failed:\n{done.stderr}")
        return json.loads(out.read_text())
