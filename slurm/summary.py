"""The runs of a sweep as a Markdown table.

python3 slurm/summary.py runs/ARRAY_ID

It needs the standard library alone, as it runs where only the ranks may have a container or an environment.
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

FORMAT_VERSION = 1  # the newest report.json that is known here, as in nanogpt/storage/json_file.py
COLUMNS = ("exit_reason", "steps", "loss", "exact_recall", "train_s")


def main() -> int:
    """Print the table of the directory that the command line names."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("error: summary.py needs the directory of a sweep, runs/ARRAY_ID", file=sys.stderr)
        return 2
    runs = {path.name: read_report(path) for path in sorted(Path(sys.argv[1]).glob("*=*"), key=by_value)}
    print(f"| run | {' | '.join(COLUMNS)} |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name, report in runs.items():
        print(f"| {name} | {' | '.join(cell(report.get(column)) for column in COLUMNS)} |")
    steps = [report["steps"] for report in runs.values() if report.get("reached")]
    spread = f" after {min(steps)} to {max(steps)} steps, median {median(steps):g}" if steps else ""
    print(f"\n{len(steps)} of {len(runs)} runs reached their target{spread}.")
    return 0


def read_report(run_dir: Path) -> dict[str, Any]:
    """report.json with its recall on the top level; of a run that left none, or of an unknown version, only that."""
    try:
        report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"exit_reason": "no report"}
    if not isinstance(report, dict):
        return {"exit_reason": "no report"}
    version = report.get("format_version", 1)  # a file without it is of version 1
    if version not in range(1, FORMAT_VERSION + 1):
        return {"exit_reason": f"report.json has format_version {version}, {FORMAT_VERSION} is the newest known here"}
    return report | (report.get("recall") or {})


def by_value(path: Path) -> tuple[float, str]:
    """Numbers in their order, then words in theirs."""
    value = path.name.partition("=")[2]
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
