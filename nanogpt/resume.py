"""Where a run begins: afresh, or from a checkpoint; and that it may.

start = find_start(config, corpus_sha256)       # on the first rank, before anything is made
"""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from secrets import token_hex

from nanogpt.checkpoint import CHECKPOINTS, MANIFEST, Checkpoint, newest_intact
from nanogpt.config import TrainConfig
from nanogpt.errors import CheckpointError, ConfigError
from nanogpt.run_dir import CONFIG, REPORT, begun_in, check_free, check_writable

# What may differ from the run that is resumed: who computes it and how long, what is written and where. The text is
# compared by what it holds.
MAY_CHANGE = {
    "data", "micro_batch_size", "max_steps", "max_minutes", "max_bad_steps", "preflight", "engine", "zero_stage",
    "ds_config", "health", "compile", "out_dir", "log_every", "profile_steps", "checkpoint_every",
    "checkpoint_minutes", "keep_checkpoints", "resume", "comm_timeout_s", "wandb", "wandb_project",
    "wandb_group", "wandb_name", "wandb_tags", "wandb_notes", "wandb_artifact",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    out_dir: Path
    checkpoint: Path | None = None  # None: at step 0
    fresh: bool = False  # nothing of an earlier attempt is in out_dir
    skipped: list[str] = field(default_factory=list)  # a line for each newer checkpoint that is broken
    ended: str = ""  # why the run in out_dir is over, by its report: there is nothing to do
    wandb_run_id: str = field(default_factory=lambda: os.environ.get("WANDB_RUN_ID") or token_hex(4))


def in_its_own_dtype(config: TrainConfig) -> TrainConfig:
    """config with the dtype of the run in out_dir, where it would be chosen anew by the machine that it goes on on."""
    if config.dtype != "auto" or config.resume not in ("auto", "must"):
        return config
    before = begun_in(Path(os.path.expanduser(config.out_dir))).get("config")
    dtype = before.get("dtype") if isinstance(before, dict) else None
    return replace(config, dtype=dtype) if dtype in ("bf16", "fp32") else config


def find_start(config: TrainConfig, corpus_sha256: str) -> Start:
    """What --resume asks for. Raises ConfigError where that cannot be."""
    if config.resume == "never":
        return Start(_check_free(config.out_dir), fresh=True)
    if config.resume not in ("auto", "must"):
        checkpoint, skipped = _at(Path(config.resume).expanduser())
        fresh = check_writable(config.out_dir).resolve() not in checkpoint.path.resolve().parents
        out_dir = _check_free(config.out_dir) if fresh else check_writable(config.out_dir)
    else:
        fresh, out_dir = False, check_writable(config.out_dir)
        checkpoint, skipped = newest_intact(out_dir)
    if checkpoint is None:
        if skipped:
            raise ConfigError(f"--out_dir={config.out_dir} has no intact checkpoint: {'; '.join(skipped)}")
        if config.resume == "must":
            raise ConfigError(f"--resume=must: --out_dir={config.out_dir} has no checkpoint")
        # A run that was killed before its first checkpoint begins again; a finished one without any is not touched.
        if not _was_cut_short(out_dir):
            return Start(_check_free(config.out_dir), fresh=True)
        return Start(out_dir, **_same_wandb_run(begun_in(out_dir).get("wandb_run_id")))
    _check_same(config, corpus_sha256, checkpoint)
    return Start(
        out_dir, checkpoint.path, fresh, skipped,
        ended="" if fresh else _end(config, out_dir, checkpoint),
        # In another directory it is another run: two of them cannot write one.
        **({} if fresh else _same_wandb_run(checkpoint.progress["wandb_run_id"])),
    )  # fmt: skip


def _check_free(out_dir: str) -> Path:
    path = check_free(out_dir)
    if (path / CHECKPOINTS).exists():  # they may be of later steps, and would be taken for the newest
        raise ConfigError(f"--out_dir={out_dir} holds checkpoints: name another directory, or remove them")
    return path


def _same_wandb_run(run_id: str | None) -> dict[str, str]:
    return {"wandb_run_id": run_id} if run_id and "WANDB_RUN_ID" not in os.environ else {}


def _at(path: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that a person named, itself or by its run."""
    if (path / MANIFEST).exists() or path.parent.name == CHECKPOINTS:
        try:
            return Checkpoint(path), []
        except CheckpointError as error:
            raise ConfigError(f"--resume={path} {error}") from None
    checkpoint, skipped = newest_intact(path)
    if checkpoint is None:
        raise ConfigError(f"--resume={path} holds no intact checkpoint{': ' * bool(skipped)}{'; '.join(skipped)}")
    return checkpoint, skipped


def _check_same(config: TrainConfig, corpus_sha256: str, checkpoint: Checkpoint) -> None:
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


def _was_cut_short(out_dir: Path) -> bool:
    """Whether a run began here and neither ended nor saved anything."""
    return (out_dir / CONFIG).exists() and _exit_reason(out_dir) in ("", "stopped")


def _end(config: TrainConfig, out_dir: Path, checkpoint: Checkpoint) -> str:
    """The exit_reason of the run in out_dir, where it stands: its target is reached, or a budget still spent."""
    steps, minutes = config.max_steps, config.max_minutes
    stands = {
        "target_reached": True,
        "max_steps": steps is not None and checkpoint.step >= steps,
        "max_minutes": minutes is not None and checkpoint.progress["train_s"] > 60 * minutes,
    }
    reason = _exit_reason(out_dir)
    return reason if stands.get(reason) else ""


def _exit_reason(out_dir: Path) -> str:
    """Of the report in out_dir; '' where there is none."""
    try:
        return json.loads((out_dir / REPORT).read_text(encoding="utf-8"))["exit_reason"]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out_dir / REPORT} cannot be read: {error!r}") from None
