"""Is this cluster fit to train? One command that computes, breaks and proves.

torchrun --nproc_per_node=8 -m nanogpt accept --out_dir=acceptance
python -m nanogpt accept --verify=acceptance
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from nanogpt.acceptance.expected import read_expected
from nanogpt.acceptance.files import LOGS, PAGE, REPORT, SIGNATURE, differences, exclude, headline
from nanogpt.acceptance.report import STAGES, Acceptance
from nanogpt.acceptance.run import AcceptanceRun, Request
from nanogpt.acceptance.signature import checked_signature, find_key, sign
from nanogpt.acceptance.stages.training import check_options
from nanogpt.acceptance.supervisor import RanksLost, Supervisor
from nanogpt.acceptance.verdict import Verdict, worst
from nanogpt.config.errors import ConfigError, RunError
from nanogpt.config.fault import Fault, check_fault
from nanogpt.config.files import user_path
from nanogpt.config.options import Options, option, require_positive
from nanogpt.distributed.world import World
from nanogpt.plan.checks import refuse_copies
from nanogpt.utils.console import outlive_output, say
from nanogpt.utils.format import counted

MEET_S = 120.0  # that the ranks wait for each other


@dataclass(frozen=True)
class AcceptOptions(Options):
    """What `accept` is asked."""

    out_dir: str = option("acceptance", "where the report and the runs are written; it must hold no acceptance yet")
    minutes: float = option(5.0, "how long it is to take; what does not fit is UNKNOWN", "minutes")
    expect: str | None = option(
        None, "file with the bus bandwidth that the network must reach; none: what is known of common machines"
    )
    stages: str = option(",".join(STAGES), "which stages to make; inventory always is")
    training: str = option("--recipe=fast", "options of the run that is trained to its target")
    sign: str | None = option(None, "sign acceptance.json with this private key of ssh-keygen")
    verify: str | None = option(None, "check the acceptance that this directory holds, and make none")
    inject: str | None = option(
        None,
        "break the numerics on purpose, KIND:rank=R,step=S, to see how a sick cluster's report looks; needs "
        "NANOGPT_ALLOW_FAULTS=1",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "minutes")
        check_options(self.training)
        for stage in self.stages.split(","):
            if stage not in STAGES:
                raise ConfigError(f"--stages={self.stages}: {stage!r} is none of {', '.join(STAGES)}")


def accept(options: AcceptOptions) -> int:
    """Say whether this cluster is fit to train; status 0: nothing failed, 1: something did."""
    if options.verify is not None:
        return _verify(user_path(options.verify, f"--verify={options.verify}"))
    outlive_output()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process of a job is left behind
    refuse_copies()
    world = World.from_env()
    fault = Fault.parse(options.inject) if options.inject else None
    if fault:
        check_fault(fault, world.size)
    request = Request(
        minutes=options.minutes, stages=tuple(options.stages.split(",")), training=options.training,
        expected=read_expected(options.expect), inject=fault,
    )  # fmt: skip
    out_dir = user_path(options.out_dir, f"--out_dir={options.out_dir}").absolute()
    key = find_key(options.sign) if options.sign else None
    if world.is_first:
        _make_directory(out_dir)
    supervisor = Supervisor(world, world.meet(timeout_s=MEET_S), logs=out_dir / LOGS)
    if not supervisor.leads:
        return supervisor.serve()
    try:
        run = AcceptanceRun(supervisor, request, out_dir, _say_stage)
    except RanksLost as lost:  # a moment after all had met
        raise RunError(str(lost)) from None
    found = run.run()
    if key:
        sign(out_dir / REPORT, key)
    _say_end(found, out_dir)
    status = int(found.verdict is Verdict.FAIL)
    supervisor.dismiss(status)
    return status


def _verify(directory: Path) -> int:
    """Check an acceptance; status 1 where something does not follow from the rest."""
    differing = 0
    for line in differences(directory):
        differing += 1
        say(f"DIFFERS {line}")
    signature = directory / SIGNATURE
    if signature.exists():
        is_good, line = checked_signature(directory / REPORT, signature)
        differing += not is_good
        say(line)
    else:
        say("not signed: it may be anybody's")
    if differing:
        print(f"NOT verified: {counted(differing, 'difference')}", file=sys.stderr)
        return 1
    found = Acceptance.read(directory / REPORT, of="the directory of an acceptance")
    say("verified: hashes, comparisons and verdicts follow from the figures; that a cluster gave them cannot be shown")
    say(headline(found))
    return 0


def _make_directory(out_dir: Path) -> None:
    """Raises ConfigError where it cannot be written, or is another acceptance's."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if any(out_dir.iterdir()):
            raise ConfigError(f"--out_dir={out_dir} is not empty: name another one")
    except OSError as error:
        raise ConfigError(f"--out_dir={out_dir} cannot be written: {error.strerror or error}") from None


def _say_stage(found: Acceptance, stage: str) -> None:
    """A line for a stage, and one for each check in it that did not pass."""
    checks = found.checks[stage]
    say(f"{worst(checks):<8}{stage:<11}{found.seconds[stage]:6.1f} s  {len(checks)} checks")
    for check in checks:
        if check.verdict is not Verdict.PASS:
            expected = f" (expected: {check.expected})" if check.expected else ""
            say(f"        {check.verdict}: {check.name}: {check.found}{expected}")


def _say_end(found: Acceptance, out_dir: Path) -> None:
    say(headline(found))
    if others := exclude(found):
        say(f"without them: sbatch {others}")
    say(f"written: {out_dir / REPORT}, {out_dir / PAGE}; check them with: python -m nanogpt accept --verify={out_dir}")
