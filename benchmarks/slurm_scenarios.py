"""How long it takes a job to save, to come back and to train again, in each scenario of tests/slurm.

python benchmarks/slurm_scenarios.py --out=benchmarks/results/slurm_scenarios.json
python benchmarks/slurm_scenarios.py --table=benchmarks/results/slurm_scenarios.json

The first starts a Slurm cluster on this machine (tests/slurm/cluster.sh says what that needs) and writes JSON, the
second prints it as the table in docs/slurm.md.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "slurm")]

from cluster import slurm, start_cluster, why_not  # noqa: E402
from nanogpt.config.cli import main, parse  # noqa: E402
from nanogpt.config.errors import ConfigError  # noqa: E402
from nanogpt.config.options import Options, option  # noqa: E402
from nanogpt.storage.json_file import write_json  # noqa: E402
from scenarios import SCENARIOS  # noqa: E402


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """Where to, or which result to print."""

    out: str = option("benchmarks/results/slurm_scenarios.json", "where the result goes")
    table: str | None = option(None, "print this result as a Markdown table, and measure nothing")


def run() -> int:
    """Measure, or print."""
    options = parse(BenchmarkOptions, sys.argv[1:], program="benchmarks/slurm_scenarios.py", about=__doc__ or "")
    if options.table:
        print(table(json.loads(Path(options.table).read_text())))
        return 0
    if reason := why_not():
        raise ConfigError(f"no Slurm cluster here: {reason}")
    result = measure()
    write_json(Path(options.out), result)
    print(table(result))
    return 0


def measure() -> dict[str, Any]:
    """Play every scenario."""
    with start_cluster(nodes=3) as cluster, tempfile.TemporaryDirectory() as directory:
        settings = slurm("scontrol", "show", "config").splitlines()
        known = dict(map(str.strip, line.split("=", 1)) for line in settings if "=" in line)
        scenarios = {}
        for name, play in SCENARIOS.items():
            cwd = Path(directory, name)
            cwd.mkdir()
            played = play(cluster, cwd)
            scenarios[name] = {
                "state": played.job.state,
                "restarts": played.job.restarts,
                "saved_s": played.saved_s,
                "left_s": played.left_s,
                "first_step_s": played.first_step_s,
                "device": json.loads((played.job.run_dir / "config.json").read_text())["device"],
            }
    return {"scenarios": scenarios, "slurm": {key: known[key] for key in ("SLURM_VERSION", "ProctrackType")}}


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
    main(run)
