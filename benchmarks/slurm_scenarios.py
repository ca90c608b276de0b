"""How long it takes a job to save, to come back and to train again, in each scenario of tests/slurm.

python benchmarks/slurm_scenarios.py
python benchmarks/slurm_scenarios.py --table=benchmarks/results/slurm_scenarios.epyc.2026-11-25.json

The first starts a Slurm cluster on this machine (tests/slurm/cluster.sh says what that needs) and writes JSON, the
second prints it as the table in docs/how-to/slurm.md. The scenarios are played by a program of the tests, as
the tests play them.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from parts import REPOSITORY
from parts.options import BenchmarkOptions, read_result, run_benchmark

from nanogpt.config.errors import ConfigError

NO_CLUSTER = 2  # the status of the scenarios' program


def measure(_: BenchmarkOptions, out: Path) -> dict[str, Any]:
    """Play every scenario."""
    with tempfile.TemporaryDirectory() as directory:
        times = Path(directory, "times.json")
        done = subprocess.run(
            [sys.executable, REPOSITORY / "tests" / "slurm" / "scenarios.py", times],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode == NO_CLUSTER:
            raise ConfigError(f"no Slurm cluster here: {done.stderr.strip()}")
        if done.returncode:
            raise SystemExit(f"the scenarios failed:\n{done.stderr}")
        return read_result(times)


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    devices = {facts["device"] for facts in result["scenarios"].values()}
    slurm_facts = result["slurm"]
    lines = [
        f"Slurm {slurm_facts['SLURM_VERSION']}, {slurm_facts['ProctrackType']}, two nodes with a rank each, all on one "
        f"machine ({', '.join(sorted(devices))}):",
        "",
        "| event | the job | event to saved | event to requeued or over | requeued to first step |",
        "|---|---|---|---|---|",
    ]
    for name, facts in result["scenarios"].items():
        became = "requeued, resumed, " * facts["restarts"] + facts["state"]
        times = " | ".join(
            "" if facts[key] is None else f"{facts[key]:.1f} s" for key in ("saved_s", "left_s", "first_step_s")
        )
        lines.append(f"| {name} | {became} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, BenchmarkOptions, measure, table)
