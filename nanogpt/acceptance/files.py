"""The directory of an acceptance: its report as JSON and as a page, what the runs left; and whether it holds together.

acceptance = write(acceptance, Path("acceptance"))
problems = list(differences(Path("acceptance")))    # one line each
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from nanogpt.acceptance.page import Page, StageRow, make_page
from nanogpt.acceptance.report import STAGES, Acceptance
from nanogpt.acceptance.stages.compute import compute_by_rank
from nanogpt.acceptance.stages.faults import UNDISTURBED, first_difference, losses_of
from nanogpt.acceptance.stages.network import network_by_rank
from nanogpt.acceptance.stages.numerics import Curve as TrainedCurve
from nanogpt.acceptance.stages.numerics import Golden, departure, golden, golden_sha256, verdict_of
from nanogpt.acceptance.stages.training import training_of
from nanogpt.acceptance.verdict import Verdict, worst
from nanogpt.config.errors import ConfigError
from nanogpt.config.files import whole
from nanogpt.evaluate.verify import load_scored_run, verify_run
from nanogpt.plots.band_chart import Curve
from nanogpt.storage.json_file import to_json
from nanogpt.storage.provenance import installed_version
from nanogpt.storage.run_dir import CONFIG, METRICS, WEIGHTS
from nanogpt.storage.run_dir import REPORT as RUN_REPORT
from nanogpt.storage.tensor_file import file_sha256
from nanogpt.utils.format import counted

REPORT, PAGE, SIGNATURE = "acceptance.json", "acceptance.html", "acceptance.json.sig"
LOGS, FAULTS, TRAINING = "logs", "faults", "training"
EVIDENCE = (RUN_REPORT, METRICS, CONFIG, WEIGHTS)  # of a run


def write(acceptance: Acceptance, out_dir: Path) -> Acceptance:
    """Judge it, write both files -> it with its verdicts and hashes. Raises OSError."""
    found = replace(acceptance.judged(), files=hashes(out_dir) if acceptance.is_finished else {})
    found.write(out_dir / REPORT)
    with whole(out_dir / PAGE) as file:
        file.write(make_page(page_of(found)).encode())
    return found


def hashes(out_dir: Path) -> dict[str, str]:
    """SHA-256 of what the runs left, by its path within out_dir."""
    runs = [out_dir / TRAINING, *sorted((out_dir / FAULTS).glob("*"))]
    paths = [run / name for run in runs for name in EVIDENCE if (run / name).exists()]
    return {str(path.relative_to(out_dir)): file_sha256(path) for path in paths}


def headline(found: Acceptance) -> str:
    """The verdict in one line, with names."""
    checks = [check for stage in found.checks.values() for check in stage]
    counts = Counter(check.verdict for check in checks)
    if found.verdict is Verdict.FAIL:
        failed = [check.name for check in checks if check.verdict is Verdict.FAIL]
        ranks = [f"{found.hosts[rank]} (rank {rank})" for rank in found.blamed_ranks]
        on_purpose = f" (broken on purpose: {found.inject})" if found.inject else ""
        return f"FAIL{on_purpose}: {', '.join(ranks) or 'no rank in particular'}; {'; '.join(failed)}"
    if found.verdict is Verdict.PASS and found.is_finished:
        return f"PASS: all of {counted(len(checks), 'check')}"
    unfinished = "" if found.is_finished else ", and it is not finished"
    return f"UNKNOWN: nothing failed, {counts[Verdict.UNKNOWN]} of {counted(len(checks), 'check')} unknown{unfinished}"


def exclude(found: Acceptance) -> str:
    """What sbatch is told to do without the nodes that are to blame; '' where none is, or no other is left."""
    return f"--exclude={','.join(found.blamed)}" if set(found.blamed) < set(found.hosts) and found.blamed else ""


def page_of(found: Acceptance) -> Page:
    """What acceptance.html shows."""
    versions = found.code.versions if found.code else {}
    nodes = len(set(found.hosts))
    facts = (
        ("begun", f"{found.begun_at} UTC"),
        ("took", f"{sum(found.seconds.values()) / 60:.1f} min, {found.minutes:g} min were given"),
        ("ranks", f"{len(found.hosts)} on {counted(nodes, 'node')}"),
        ("device", ", ".join(dict.fromkeys(found.devices))),
        ("program", f"nanogpt-overfit {versions.get('nanogpt-overfit')}, torch {versions.get('torch')}"),
        ("commit", (found.code.git_commit if found.code else None) or "unknown"),
        *((("broken on purpose", found.inject),) if found.inject else ()),
    )
    stages = tuple(
        StageRow(name, about, worst(found.checks[name]), found.seconds.get(name), found.checks[name])
        for name, about in STAGES.items()
    )
    return Page(
        verdict=found.verdict, headline=headline(found), facts=facts, exclude=exclude(found), stages=stages,
        hosts=found.hosts,
        per_rank=(
            *(compute_by_rank(found.compute) if found.compute else ()),
            *(network_by_rank(found.network) if found.network else ()),
        ),
        curves=tuple(
            _chart_of(curve, right, steps)
            for curve in found.curves
            if (steps := len(curve.losses)) and (right := golden(curve.dtype)) and _is_shown(curve, found)
        ),
    )  # fmt: skip


def _chart_of(curve: TrainedCurve, right: Golden, steps: int) -> Curve:
    """A curve beside its golden one; where not its losses but gradient norms or replicas decide, it says so."""
    verdict, why = verdict_of(curve, right)
    told = {} if verdict is Verdict.PASS else {"verdict": verdict.name.lower(), "why": why}
    return Curve(curve.name, curve.losses, right.losses[:steps], right.loss_band[:steps], **told)


def _is_shown(curve: TrainedCurve, found: Acceptance) -> bool:
    """Whether a curve is drawn: of ranks alone those that leave their band, or all where there is no other."""
    return curve.rank is None or len(found.hosts) == 1 or departure(curve, golden(curve.dtype)) != ""


def differences(out_dir: Path) -> Iterator[str]:
    """What in the directory of an acceptance does not follow from the rest of it, a line each.

    Raises ConfigError where it holds no acceptance, one that this version would judge otherwise, or figures of which
    nothing can be made.
    """
    stated = Acceptance.read(out_dir / REPORT, of="the directory of an acceptance")
    made_by, mine = stated.code, installed_version("nanogpt-overfit")
    version = made_by.versions.get("nanogpt-overfit") if made_by else None
    if version != mine:
        raise ConfigError(f"{out_dir} is of nanogpt-overfit {version}, and this is {mine}, which may judge otherwise")
    if stated.golden_sha256 != golden_sha256():
        raise ConfigError(f"{out_dir} was held to other golden curves than this version's, which may judge otherwise")
    try:
        yield from _verdicts(stated, out_dir)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{out_dir / REPORT} holds figures of which nothing can be made: {error!r}") from None
    there = hashes(out_dir)
    yield from _hashes(stated, there)
    yield from _drills(stated, out_dir / FAULTS, there)
    yield from _training(stated, out_dir / TRAINING)


def _verdicts(stated: Acceptance, out_dir: Path) -> Iterator[str]:
    found = stated.judged()
    for stage in STAGES:
        if to_json(stated.checks.get(stage)) != to_json(found.checks[stage]):
            yield f"{REPORT}: the checks of {stage} do not follow from its figures"
    if stated.verdict is not found.verdict:
        yield f"{REPORT}: the verdict is {stated.verdict}, the checks say {found.verdict}"
    if not stated.is_finished:
        yield f"{REPORT}: the acceptance was not finished"
    try:
        shown = (out_dir / PAGE).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        yield f"{PAGE} cannot be read"
        return
    if shown != make_page(page_of(stated)):
        yield f"{PAGE} does not show {REPORT}"


def _hashes(stated: Acceptance, there: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(there.keys() | stated.files.keys()):
        if name not in there:
            yield f"{name} is missing"
        elif name not in stated.files:
            yield f"{name} is not in {REPORT}"
        elif there[name] != stated.files[name]:
            yield f"{name} has changed: its SHA-256 differs"


def _drills(stated: Acceptance, faults: Path, there: Mapping[str, str]) -> Iterator[str]:
    """Compare the runs that were broken once more."""
    if stated.drills is None:
        return
    right = losses_of(faults / UNDISTURBED)
    for drill in stated.drills.drills:
        losses = losses_of(faults / drill.folder)
        if (len(losses), first_difference(losses, right)) != (drill.steps, drill.first_difference):
            yield f"{FAULTS}/{drill.folder}: its losses are not what {REPORT} says of them"
        if there.get(f"{FAULTS}/{drill.folder}/{WEIGHTS}") != drill.weights_sha256:
            yield f"{FAULTS}/{drill.folder}: its weights are not what {REPORT} says of them"


def _training(stated: Acceptance, run: Path) -> Iterator[str]:
    """Read the run's figures again; where it has reached its target, compute its scores as `nanogpt verify` does."""
    if (training := stated.training) is None:
        return
    found = training_of(
        run, training.options, minutes=training.minutes, statuses=training.statuses, said=training.said,
        silent_s=training.silent_s,
    )  # fmt: skip
    if found != training:
        yield f"{TRAINING}: its figures are not what {REPORT} says of them"
    if found.loss is None or not found.is_verified:
        return
    scored = load_scored_run(str(run))
    for check in verify_run(scored, run):
        if not check.fits:
            yield f"{TRAINING}: {check.name} is stated as {check.stated}, found {check.found}"
