"""Every score of a report, computed again from the weights and the text.

python -m nanogpt verify out
"""

import sys
from dataclasses import MISSING, dataclass
from itertools import groupby

from nanogpt.config.options import Options, option
from nanogpt.evaluate.verify import load_scored_run, verify_run
from nanogpt.storage.run_dir import run_directory


@dataclass(frozen=True)
class VerifyOptions(Options):
    """What `verify` is asked."""

    run_dir: str = option(MISSING, "directory of a finished run")


def verify(options: VerifyOptions) -> int:
    """Compute every score of report.json again from the weights and the text; status 1 where one differs."""
    run = load_scored_run(options.run_dir)
    differing = []
    checks = verify_run(run, run_directory(options.run_dir))
    for group, members in groupby(checks, key=lambda check: check.group):
        fitting = total = 0
        for check in members:
            total, fitting = total + 1, fitting + check.fits
            if not check.fits:
                print(f"DIFFERS {check.name}: stated {check.stated}, found {check.found}", flush=True)
                differing.append(check.name)
        print(f"{group}: {fitting} of {total} fit", flush=True)
    if differing:
        print(f"NOT verified: {', '.join(differing)}", file=sys.stderr)
        return 1
    print(
        f"verified in {run.report.scores_precision}: all that can be recomputed from the weights and the text; steps, "
        f"clocks, engine and versions cannot"
    )
    return 0
