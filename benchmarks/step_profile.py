"""Where a step's time goes, operator by operator: ours beside what a user would take instead.

python benchmarks/step_profile.py
python benchmarks/step_profile.py --table=benchmarks/results/step_profile.epyc.2026-11-28.json

The first trains and writes JSON, the second prints it as a Markdown table. The contenders are those of step_time.py,
one after the other, each in a process of its own that has the machine for itself. Recording takes time too: what a
step takes is step_time.py's to say.
"""

import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts.contenders import contenders_here
from parts.options import BenchmarkOptions, as_words, run_benchmark
from parts.turns import Contender, StepOptions, circumstances, describe_circumstances

from nanogpt.config.options import option
from nanogpt.distributed.world import World

WARM_UP_STEPS = 2  # which allocate
TOP = 12  # rows of the table


@dataclass(frozen=True)
class ProfileOptions(StepOptions, BenchmarkOptions):
    """What to record, or which result to print."""

    steps: int = option(3, "recorded of each contender", "steps")


def measure(options: ProfileOptions, out: Path) -> dict[str, Any]:
    """Every contender, one after the other."""
    world = World.from_env()
    result: dict[str, Any] = {
        **circumstances(options, world),
        "steps": options.steps,
        "ms_per_step": {},
    }
    for name in contenders_here(world):
        print(name, file=sys.stderr, flush=True)
        with ExitStack() as stack:
            recorded = Path(stack.enter_context(tempfile.TemporaryDirectory()), "profile.json")
            process = Contender(name, as_words(options.step | {"profile": recorded}), stack)
            process.take(WARM_UP_STEPS)
            process.take(options.steps)
            result["ms_per_step"][name] = json.loads(recorded.read_text())
    return result


def table(result: dict[str, Any]) -> str:
    """The result in Markdown: the operators that take most of some contender's step."""
    found = result["ms_per_step"]
    most = {key: max(of.get(key, 0.0) for of in found.values()) for of in found.values() for key in of}
    top = sorted(most, key=lambda key: -most[key])[:TOP]
    lines = [
        f"{describe_circumstances(result)}; ms a step, mean of {result['steps']} recorded ones:",
        "",
        f"| by its own time | {' | '.join(found)} |",
        f"|---|{'---|' * len(found)}",
    ]
    rows = {f"`{key}`": [of.get(key, 0.0) for of in found.values()] for key in top}
    rows["all others"] = [sum(ms for key, ms in of.items() if key not in top) for of in found.values()]
    rows["all operators"] = [sum(of.values()) for of in found.values()]
    return "\n".join(lines + [f"| {key} | {' | '.join(_ms(ms) for ms in row)} |" for key, row in rows.items()])


def _ms(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 10 else f"{ms:.2g}" if ms else "-"


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, ProfileOptions, measure, table)
