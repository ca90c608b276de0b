"""The run directory, a contract with other programs: config.json, metrics.jsonl, report.json, model.safetensors.

run = load_run("out")
run.model, run.config, run.report.loss
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanogpt.config.errors import ConfigError, RunError, one_line
from nanogpt.config.files import absolute_path, regular, require_regular, user_path, whole
from nanogpt.config.train_config import ResolvedConfig
from nanogpt.distributed.replicas import fingerprint
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.storage.json_file import NewerFormatError, SchemaError, no_run, parse_json
from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.report import Report
from nanogpt.storage.tensor_file import file_sha256, save_tensors

CONFIG, METRICS, REPORT, WEIGHTS = "config.json", "metrics.jsonl", "report.json", "model.safetensors"
MEMORY_PNG = "memory.png"
RECALL_PNG = "recall.png"
FINISHED = "the directory of a finished run"
ROW_BYTES = 2**20  # more than a row of metrics.jsonl has
MOST_NAMED = 5  # runs beside one that is not there
TIED = "lm_head.weight"  # the same tensor as transformer.wte.weight, which is the one that is stored


def check_free(out_dir: str) -> Path:
    """out_dir as a path that a new run can be written to, without making anything. Raises ConfigError."""
    path = check_writable(out_dir)
    if any((path / name).exists() for name in (CONFIG, METRICS, REPORT, WEIGHTS)):
        raise ConfigError(_taken(out_dir))
    return path


def check_writable(out_dir: str) -> Path:
    """out_dir as a path that can be written to, without making anything. Raises ConfigError."""
    path = absolute_path(out_dir, f"--out_dir={out_dir}")
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))  # of those that exist
    with refused_writes(out_dir):
        for name in (path, *(nearest / part for part in path.relative_to(nearest).parts)):
            with suppress(FileNotFoundError):
                os.lstat(name)  # raises for a name, or all of them, that is too long
        with TemporaryFile(dir=nearest):  # has no name
            pass
    return path


@contextmanager
def refused_writes(out_dir: str | Path) -> Iterator[None]:
    """Write out_dir within it. Raises ConfigError where that cannot be."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out_dir={out_dir} cannot be written: {error.strerror or error}") from None


def write_config(out_dir: Path, info: RunInfo, *, fresh: bool, from_step: int) -> None:
    """Make out_dir this run's by writing its config.json.

    Of an earlier attempt, which is there unless fresh, the rows of metrics.jsonl before from_step stay. Raises
    ConfigError when fresh and another run was first, or when out_dir cannot be written.
    """
    with refused_writes(out_dir):
        try:
            info.write(out_dir / CONFIG, exclusive=fresh)
        except FileExistsError:
            raise ConfigError(_taken(str(out_dir))) from None
        if not fresh:
            _cut_metrics(out_dir / METRICS, from_step)
            for name in (REPORT, WEIGHTS, RECALL_PNG, MEMORY_PNG):  # they would tell of another end
                (out_dir / name).unlink(missing_ok=True)


def begun_in(out_dir: Path) -> RunInfo | None:
    """What config.json says of the run that was begun in out_dir.

    None where there is none, or one that was cut off or damaged. Raises NewerFormatError.
    """
    try:
        return RunInfo.find(out_dir / CONFIG)
    except NewerFormatError:
        raise
    except ConfigError:
        return None


def _cut_metrics(path: Path, from_step: int) -> None:
    """Drop the rows from from_step on, and a last one that was cut off."""
    with suppress(FileNotFoundError), open(path, "rb", opener=regular) as rows, whole(path) as kept:
        while (line := rows.readline(ROW_BYTES)).endswith(b"\n"):
            try:
                if parse_json(line)["step"] >= from_step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept.write(line)


def save_weights(out_dir: Path, state: dict[str, Tensor], evaluated: dict[str, bytes]) -> str:
    """model.safetensors: every parameter of an engine's state_dict() -> the file's SHA-256.

    evaluated: the fingerprints of the weights whose loss is reported; empty where none is. What was written is read
    back: the report shall be of the file. Raises RunError when there is no room, or when it holds other weights.
    """
    temporary = out_dir / (WEIGHTS + ".tmp")
    wanted = evaluated or {name: fingerprint(weight) for name, weight in state.items()}
    try:
        save_tensors(state, temporary)
        found = {name: fingerprint(weight) for name, weight in load_file(temporary).items()}
        unlike = [name for name in wanted if found.get(name) != wanted[name]]
        if not unlike:
            os.replace(temporary, out_dir / WEIGHTS)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{out_dir / WEIGHTS} cannot be written ({error}): make room and start again") from None
    if unlike:
        temporary.unlink()
        raise RunError(
            f"{out_dir / WEIGHTS}, read back, differs from the evaluated weights in {unlike[0]}: memory or disk is "
            f"faulty; start again"
        )
    return weights_sha256(out_dir)


def weights_sha256(out_dir: Path) -> str:
    """Of model.safetensors as it is on disk now."""
    return file_sha256(out_dir / WEIGHTS)


def run_directory(given: str) -> Path:
    """The directory that a person named as a run's. Raises ConfigError where there is none."""
    path = user_path(given, given)
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # it may be there
        raise ConfigError(f"{given} cannot be read: {error.strerror}") from None
    others = ", ".join(_runs_beside(path))
    raise ConfigError(f"{given}: no such run directory" + (f"; those beside it: {others}" if others else ""))


def _runs_beside(path: Path) -> list[str]:
    """The names of some run directories where path would be; a model in Hugging Face's form has no METRICS."""
    names = sorted(metrics.parent.name for metrics in path.parent.glob(f"*/{METRICS}"))
    return names[:MOST_NAMED] + ["..."] * (len(names) > MOST_NAMED)


@dataclass(frozen=True)
class Run:
    """A finished run, read back."""

    config: ResolvedConfig
    report: Report
    model: GPT
    text_files: Mapping[str, str]  # SHA-256 of each file of the text, by its path; empty: an earlier version's run


def read_config(path: Path) -> tuple[RunInfo, ResolvedConfig]:
    """config.json of the run in a directory. Raises ConfigError when it is missing, damaged or of no run."""
    info = RunInfo.read(path / CONFIG, of=FINISHED)
    try:
        return info, info.resolved_config()
    except SchemaError as error:
        raise no_run(path / CONFIG, error) from None


def load_run(out_dir: str) -> Run:
    """The run in out_dir with its final weights, on the CPU. Raises ConfigError when a file is missing or damaged."""
    path = run_directory(out_dir)
    info, config = read_config(path)
    report = Report.read(path / REPORT, of=FINISHED)
    shape = GPTConfig.from_options(config)
    try:
        require_regular(path / WEIGHTS)
        state = load_file(path / WEIGHTS)
        values = sum(weight.numel() for weight in state.values())
        if values != shape.num_parameters:  # before a model is built of what config.json says
            raise RuntimeError(f"{values:,} values, {shape.num_parameters:,} by {CONFIG}")
        state[TIED] = state["transformer.wte.weight"]
        model = GPT(shape)
        model.load_state_dict(state)
    except FileNotFoundError:
        raise ConfigError(f"{path / WEIGHTS}: no such file: has the run ended?") from None
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{path / WEIGHTS} is damaged or of another model: {one_line(error)}") from None
    return Run(config, report, model.eval(), info.text_files or {})


def _taken(out_dir: str) -> str:
    return f"--out_dir={out_dir} already holds a run: name another directory"
