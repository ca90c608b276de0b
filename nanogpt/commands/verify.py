"""Every score of a report, computed again from the weights and the text.

python -m nanogpt verify out
"""

import sys
from dataclasses import MISSING, dataclass

from nanogpt.config.options import Options, option
from nanogpt.data.corpus import read_corpus
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
    for check in verify_run(run, run_directory(options.run_dir), read_corpus(run.config.data)):
        verdict = "fits   " if check.fits else "DIFFERS"
        print(f"{verdict} {check.name}: stated {check.stated}, found {check.found}", flush=True)
        if not check.fits:
            differing.append(check.name)
    if differing:
        print(f"NOT verified: {', '.join(differing)}", file=sys.stderr)
        return 1
    print(
        f"verified in {run.report.scores_precision}: all that can be recomputed from the weights and the text; steps, "
        f"clocks, engine and versions cannot"
    )
    return 0
