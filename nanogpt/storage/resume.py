"""Where a run begins: afresh, or from a checkpoint; and that it may.

start = find_start(config, corpus_sha256)       # on the first rank, before anything is made
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from secrets import token_hex

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import absolute_path, user_path
from nanogpt.config.options import option_names
from nanogpt.config.train_config import TrainConfig
from nanogpt.storage.checkpoint import CHECKPOINTS, MANIFEST, CheckpointError, CheckpointReader, newest_intact
from nanogpt.storage.json_file import find_known
from nanogpt.storage.report import exit_reason
from nanogpt.storage.run_dir import CONFIG, REPORT, begun_in, check_free, check_writable

# Who computes a run and how long, what is written and where; the text is compared by what it holds.
MAY_CHANGE = option_names(TrainConfig, may_change=True)
UNFINISHED = ("", "stopped")  # exit reasons of a run that was killed or asked to stop
MAY_GO_ON = (*UNFINISHED, "max_steps", "max_minutes")  # and of one that a larger budget lets go on


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins."""

    out_dir: Path
    checkpoint: Path | None = None  # None: at step 0
    fresh: bool = False  # nothing of an earlier attempt is in out_dir
    begun_with: str = "auto"  # what --resume said when the run in out_dir began, a path in full
    notes: list[str] = field(default_factory=list)  # what a person may not expect, a line each
    ended: str = ""  # why the run in out_dir is over, by its report: there is nothing to do
    wandb_run_id: str = field(default_factory=lambda: os.environ.get("WANDB_RUN_ID") or token_hex(4))


def in_its_own_dtype(config: TrainConfig) -> TrainConfig:
    """config with the dtype of the run in out_dir, where it would be chosen anew by the machine that it goes on on."""
    out_dir = absolute_path(config.out_dir, f"--out_dir={config.out_dir}")
    if config.dtype != "auto" or not _goes_on(config, out_dir):
        return config
    before = begun_in(out_dir)
    dtype = before.config.get("dtype") if before and before.config else None
    return replace(config, dtype=dtype) if dtype in ("bf16", "fp32") else config


def find_start(config: TrainConfig, corpus_sha256: str) -> ResumePoint:
    """What --resume asks for. Raises ConfigError where that cannot be."""
    out_dir = check_writable(config.out_dir)
    if not _goes_on(config, out_dir):
        return _begin(config, corpus_sha256, out_dir, _asked(config))
    begun_with = _begun_with(out_dir) or _asked(config)
    checkpoint, skipped = newest_intact(out_dir)
    if checkpoint is None:
        if skipped:
            raise ConfigError(f"--out_dir={config.out_dir} has no intact checkpoint: {'; '.join(skipped)}")
        if config.resume == "must":
            raise ConfigError(f"--resume=must: --out_dir={config.out_dir} has no checkpoint")
        return _begin(config, corpus_sha256, out_dir, begun_with)
    _check_same(config, corpus_sha256, checkpoint)
    notes = _skipped(skipped) + _other_windows(config, checkpoint)
    if config.resume not in ("auto", "must", "never"):
        notes.append(
            f"--resume={config.resume} started the run in {config.out_dir}, which now goes on from its own newest "
            f"checkpoint; to start from --resume again, name another --out_dir"
        )
    return ResumePoint(
        out_dir, checkpoint.path, False, begun_with, notes, ended=_end(config, out_dir, checkpoint),
        **_same_wandb_run(checkpoint.progress.get("wandb_run_id")),
    )  # fmt: skip


def _goes_on(config: TrainConfig, out_dir: Path) -> bool:
    """Whether out_dir's newest checkpoint is the one to go on from.

    A command begins its run once: when a person, torchrun or Slurm starts it again, that run goes on.
    """
    own = _begun_with(out_dir) == _asked(config) and (config.resume != "never" or _exit_reason(out_dir) in MAY_GO_ON)
    return config.resume in ("auto", "must") or own


def _asked(config: TrainConfig) -> str:
    """auto, never, or the path that --resume names, in full."""
    if config.resume in ("auto", "must"):
        return "auto"
    return "never" if config.resume == "never" else os.path.realpath(_named(config))


def _named(config: TrainConfig) -> Path:
    """The path that --resume names."""
    return user_path(config.resume, f"--resume={config.resume}")


def _begun_with(out_dir: Path) -> str:
    """What _asked() was when the run in out_dir began; '' where there is none."""
    if not os.path.exists(out_dir / CONFIG):
        return ""
    before = begun_in(out_dir)
    return before.begun_with if before else "auto"


def _begin(config: TrainConfig, corpus_sha256: str, out_dir: Path, begun_with: str) -> ResumePoint:
    """At step 0 or from the checkpoint that was named; again, where the run was cut short before its own first one."""
    checkpoint, notes, wandb_run_id, fresh = None, [], None, False
    if begun_with not in ("auto", "never"):
        checkpoint, skipped = _at(_named(config) if begun_with == _asked(config) else Path(begun_with))
        _check_same(config, corpus_sha256, checkpoint)
        notes = _skipped(skipped) + _other_windows(config, checkpoint)
    if checkpoint and (out_dir / CHECKPOINTS).resolve() in checkpoint.path.resolve().parents:
        wandb_run_id = checkpoint.progress.get("wandb_run_id")
    elif _begun_with(out_dir) == begun_with and _exit_reason(out_dir) in UNFINISHED:
        wandb_run_id = before.wandb_run_id if (before := begun_in(out_dir)) else None
    else:  # another run: two of them cannot write one directory, nor one of W&B's
        _check_free(config.out_dir)
        fresh = True
    return ResumePoint(
        out_dir, checkpoint.path if checkpoint else None, fresh, begun_with, notes,
        ended=_end(config, out_dir, checkpoint) if checkpoint and not fresh else "", **_same_wandb_run(wandb_run_id),
    )  # fmt: skip


def _check_free(out_dir: str) -> None:
    path = check_free(out_dir)
    if os.path.exists(path / CHECKPOINTS):  # they may be of later steps, and would be taken for the newest
        raise ConfigError(f"--out_dir={out_dir} holds checkpoints: name another directory")


def _same_wandb_run(run_id: str | None) -> dict[str, str]:
    """What makes ResumePoint that W&B run; None: a new one."""
    return {"wandb_run_id": run_id} if run_id and "WANDB_RUN_ID" not in os.environ else {}


def _skipped(lines: list[str]) -> list[str]:
    return [f"warning: {line}: skipped" for line in lines]


def _other_windows(config: TrainConfig, checkpoint: CheckpointReader) -> list[str]:
    """That a checkpoint is of a version whose shifted windows stayed inside the text."""
    if config.phase == "fixed" or checkpoint.progress.get("goes_round"):
        return []
    return ["this checkpoint is older than windows that go round the text's end: the steps from here on see other ones"]


def _at(path: Path) -> tuple[CheckpointReader, list[str]]:
    """The checkpoint that a person named, itself or by its run."""
    if os.path.exists(path / MANIFEST) or path.parent.name == CHECKPOINTS:
        try:
            return CheckpointReader(path), []
        except CheckpointError as error:
            raise ConfigError(f"--resume={path} {error}") from None
    checkpoint, skipped = newest_intact(path)
    if checkpoint is None:
        raise ConfigError(f"--resume={path} holds no intact checkpoint{': ' * bool(skipped)}{'; '.join(skipped)}")
    return checkpoint, skipped


def _check_same(config: TrainConfig, corpus_sha256: str, checkpoint: CheckpointReader) -> None:
    before = checkpoint.progress["config"]
    now = asdict(config)
    differing = [
        f"--{name}={now[name]} (it had {before.get(name)})"
        for name in now
        if name not in MAY_CHANGE and now[name] != before.get(name)
    ]
    if checkpoint.progress["corpus_sha256"] != corpus_sha256:
        differing.append(f"--data={config.data} (it had another text)")
    if differing:
        raise ConfigError(
            f"{checkpoint.path} is of another run: {', '.join(differing)}; make them the same, or name another "
            f"--out_dir"
        )


def _end(config: TrainConfig, out_dir: Path, checkpoint: CheckpointReader) -> str:
    """The exit_reason of the run in out_dir, where it stands: its target is reached, or a budget still spent."""
    steps, minutes = config.max_steps, config.max_minutes
    stands = {
        "target_reached": _recall_stands(config, out_dir),
        "max_steps": steps is not None and checkpoint.step >= steps,
        "max_minutes": minutes is not None and checkpoint.progress["train_s"] > 60 * minutes,
    }
    reason = _exit_reason(out_dir)
    if reason == "target_reached" and not stands[reason]:  # within its budget it goes on to a target_recall
        return next((budget for budget in ("max_steps", "max_minutes") if stands[budget]), "")
    return reason if stands.get(reason) else ""


def _recall_stands(config: TrainConfig, out_dir: Path) -> bool:
    """Whether the run in out_dir, which has reached its target, had as high a target_recall as config asks for."""
    if config.target_recall is None:
        return True
    had = (find_known(out_dir / REPORT) or {}).get("target_recall")
    return isinstance(had, float | int) and had >= config.target_recall


def _exit_reason(out_dir: Path) -> str:
    """Of the report in out_dir; '' where there is none."""
    return exit_reason(out_dir / REPORT) or ""
