"""What report.json states about the memory, computed again from the weights and the text alone.

differing = [check.name for check in verify("out") if not check.fits]
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

from nanogpt.config.errors import ConfigError
from nanogpt.data.corpus import differing_files, read_corpus
from nanogpt.data.dataset import Dataset, make_dataset
from nanogpt.data.tokenizer import encode
from nanogpt.data.windows import subset_and_windows
from nanogpt.distributed.world import World
from nanogpt.evaluate.evaluation import Evaluation, is_recalled
from nanogpt.evaluate.recall import Forward
from nanogpt.evaluate.scorecard import ROUNDINGS, Score, Scorecard, make_scorecard
from nanogpt.storage.report import Report, ScoresPrecision, TextScores
from nanogpt.storage.run_dir import Run, load_run, run_directory, weights_sha256

# Relative: `loss` of a run that gave up is of its dtype and of torch's own cross-entropy, 2e-4 from the exact one on a
# CPU in fp32. One that verified its target is the recomputable figure itself.
LOSS_SLACK = {"fp32": 1e-3, "bf16": 5e-2}

# By the first part of a check's name; the others are of what the run was given.
LOSSES = (
    "loss",
    "target_verified",
    "recall_verified",
    "floor",
    "full_pass",
    *(f.name for f in fields(TextScores) if f.name != "recall"),
)
GROUPS = {**dict.fromkeys(LOSSES, "losses and bits"), "recall": "recall", "control": "control text"}


@dataclass(frozen=True)
class Check:
    """One line of a verification."""

    name: str  # its place in report.json, or in config.json
    stated: Any
    found: Any
    fits: bool

    @property
    def group(self) -> str:
        """What it is about: the checks of a group follow one another."""
        return GROUPS.get(self.name.partition(".")[0], "text, weights and options")


def score_run(run: Run, dataset: Dataset, world: World) -> Scorecard:
    """The scorecard of a finished run that memorised dataset, as the run itself made it."""
    precision = run.report.scores_precision or ScoresPrecision.FP32
    model = run.model.to(world.device)
    if precision is ScoresPrecision.BF16_WEIGHTS:
        model = model.bfloat16()
    forward = Forward(world, precision.dtype, run.config.micro_batch_size)
    return make_scorecard(model, dataset.windows, dataset.judged, dataset.control, forward, floor=dataset.floor)


def one_process() -> World:
    """This process alone. Raises ConfigError under torchrun: scores are then the trainer's business."""
    if (world := World.from_env()).size > 1:
        raise ConfigError("scores are computed again in one process: leave torchrun out")
    return world


def verify(run_dir: str) -> list[Check]:
    """All checks of a finished run. Raises ConfigError where a file is missing, or the run has no scores."""
    run = load_scored_run(run_dir)
    return list(verify_run(run, run_directory(run_dir)))


def load_scored_run(run_dir: str) -> Run:
    """The finished run in run_dir. Raises ConfigError where there is none, or it has no scores."""
    run = load_run(run_dir)
    if run.report.unread_scores:
        raise ConfigError(f"{run_dir} was scored by another version, or edited: {run.report.unread_scores}")
    if run.report.scores is None:
        raise ConfigError(f"{run_dir} has no scores: the run ended with {run.report.exit_reason}")
    return run


def verify_run(run: Run, out_dir: Path) -> Iterator[Check]:
    """Each thing that the report states and the weights and the text can confirm, the cheap ones first.

    Not among them: steps, clocks, engine, ranks, versions. They are history; the weights do not hold it. Raises
    ConfigError where the text cannot be read.
    """
    report, config, stated = run.report, run.config, run.report.to_json()
    corpus = read_corpus(config.data)
    facts = {"corpus_sha256": corpus.sha256, "weights_sha256": weights_sha256(out_dir)} | subset_and_windows(config)
    for name, found in facts.items():
        yield Check(name, stated.get(name), found, stated.get(name) == found)
    several = max(len(run.text_files), len(corpus.files)) > 1  # the hash of one alone has been compared above
    if several and corpus.sha256 != report.corpus_sha256:
        for path in differing_files(run.text_files, corpus.files):
            yield Check(f"text_files[{path!r}]", run.text_files.get(path), corpus.files.get(path), fits=False)
    for name in ("target_loss", "target_recall"):
        given, asked = getattr(report, name), getattr(config, name)
        yield Check(name, given, asked, given == asked)
    reached = report.loss is not None and _stated(report, report.loss).reaches(config)
    # Only DeepSpeed in bf16 may be scored in bf16: whoever recomputes is allowed more there.
    in_bf16 = (config.engine, config.dtype) == ("deepspeed", "bf16")
    precisions = tuple(ScoresPrecision) if in_bf16 else (ScoresPrecision.FP32,)
    allowed = report.scores_precision in precisions
    yield Check("scores_precision", report.scores_precision, " or ".join(precisions), allowed)
    yield from _ending(report, reached)
    ids = encode(corpus.text)
    if len(ids) < config.subset_tokens:
        yield Check("tokens of the text", config.subset_tokens, len(ids), fits=False)
        return
    card = score_run(run, make_dataset(corpus, ids, config), one_process())
    scores = dict(card.flat())
    full_pass = scores["full_pass.loss"]
    if reached:
        yield _check("loss", stated, full_pass)
        yield Check("target_verified", config.target_loss, full_pass.value, full_pass.low <= config.target_loss)
        if (share := config.target_recall) is not None:
            recall, breaks = scores["full_pass.exact_recall"], scores["recall.recitation_breaks"]
            fits = is_recalled(recall.high, breaks.low == 0, share)
            yield Check("recall_verified", share, recall.value, fits)
    else:
        slack = ROUNDINGS[config.dtype].absolute + LOSS_SLACK[config.dtype] * full_pass.value
        yield _check("loss", stated, Score(full_pass.value, full_pass.value - slack, full_pass.value + slack))
    for name, score in scores.items():
        yield _check(name, stated, score)
    if card.control is None:
        yield Check("control", stated.get("control"), None, stated.get("control") is None)


def _ending(report: Report, reached: bool) -> Iterator[Check]:
    """Whether the report says that the targets are reached, and ended so; reached: by its own figures.

    A recall that hangs on a near tie does not count for a run, and is in its scores: it may have more than it says.
    """
    ended = report.exit_reason == "target_reached"
    if report.target_recall is not None and not report.reached and not ended:
        reached = False
    yield Check("reached", report.reached, reached, report.reached is reached)
    yield Check("exit_reason", report.exit_reason, "target_reached" if reached else "another", ended is reached)


def _stated(report: Report, loss: float) -> Evaluation:
    """What the report says of the last full pass, whose loss is given."""
    if report.scores is None:
        return Evaluation(loss)
    return Evaluation(loss, report.scores.full_pass.exact_recall, report.recall.recitation_breaks == 0)


def _check(name: str, stated: dict[str, Any], score: Score) -> Check:
    """Whether report.json has at name what score allows; JSON has null for what is not finite."""
    value: Any = stated
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        # As written in JSON a float is exact; the last bits are for sums that were made in another order.
        fits = score.low - 1e-9 <= value <= score.high + 1e-9
    else:
        fits = value is None and not isfinite(score.high)
    return Check(name, value, score.value, fits)
