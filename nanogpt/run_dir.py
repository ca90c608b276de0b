"""The run directory, a contract with other programs: config.json, metrics.jsonl, report.json, model.safetensors.

run = load_run("out")
run.model, run.config, run.report["loss"]
"""

import os
import stat
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanogpt.config import TrainConfig
from nanogpt.digest import file_sha256, fingerprint
from nanogpt.errors import ConfigError, one_line
from nanogpt.fence import Attempt, Fence
from nanogpt.files import absolute_path, lock, regular, require_regular, user_path, whole
from nanogpt.lost_terminal import say
from nanogpt.model import GPT, GPTConfig
from nanogpt.strict_json import find_json, parse_json, read_json, write_json
from nanogpt.tensor_file import save_tensors

CONFIG, METRICS, REPORT, WEIGHTS = "config.json", "metrics.jsonl", "report.json", "model.safetensors"
RECALL_PNG = "recall.png"
LOCK = ".lock"
FINISHED = "the directory of a finished run"
TAKEOVER_S = 60.0  # within which an earlier attempt of the same job finds the fence and leaves
ROW_BYTES = 2**20  # more than a row of metrics.jsonl has
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
    with _refused(out_dir):
        for name in (path, *(nearest / part for part in path.relative_to(nearest).parts)):
            with suppress(FileNotFoundError):
                os.lstat(name)  # raises for a name, or all of them, that is too long
        with TemporaryFile(dir=nearest):  # has no name
            pass
    return path


@contextmanager
def _refused(out_dir: str | Path) -> Iterator[None]:
    """Write out_dir within it. Raises ConfigError where that cannot be."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out_dir={out_dir} cannot be written: {error.strerror or error}") from None


def take_over(out_dir: str, attempt: Attempt) -> None:
    """Make an earlier attempt of the same Slurm job leave out_dir, if it still writes there.

    Before anything is read: it would go on saving checkpoints and dropping old ones. Raises ConfigError when the
    attempt that wrote last is a later one, or out_dir cannot be written.
    """
    path = check_writable(out_dir)
    with _refused(out_dir):
        if attempt.follows(path):
            attempt.raise_fence(path)
            with suppress(BlockingIOError), open(path / LOCK, "a", opener=regular) as held_by_it:
                lock(held_by_it, TAKEOVER_S)


@contextmanager
def held(out_dir: Path, attempt: Attempt) -> Iterator[Fence]:
    """out_dir, made if it is not there, for this process alone. Raises ConfigError while another process has it.

    A process that the lock does not reach, on another node or where the file system has no locks, is kept out by the
    fence, if it is an earlier attempt of the same job.
    """
    with _refused(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        attempt.follows(out_dir)  # refused where a later one has come in the meantime
        file = open(out_dir / LOCK, "a", opener=regular)  # noqa: SIM115, the caller's
        try:
            locked = lock(file, patience_s=0.0)
        except BlockingIOError:
            raise ConfigError(f"--out_dir={out_dir} is being written by another run: wait for it, or stop it") from None
        fence = attempt.raise_fence(out_dir)
    if not locked:
        say(f"warning: the file system of {out_dir} has no locks: nothing keeps another run out of it")
    with file:
        yield fence


def claim(out_dir: Path, config: TrainConfig, *, fresh: bool, from_step: int, **facts: Any) -> None:
    """Make out_dir this run's by writing its config.json: the resolved options, what they run on, the versions.

    Of an earlier attempt, which is there unless fresh, the rows of metrics.jsonl before from_step stay. Raises
    ConfigError when fresh and another run was first, or when out_dir cannot be written.
    """
    content = {"config": asdict(config), **facts, **provenance()}
    with _refused(out_dir):
        try:
            write_json(out_dir / CONFIG, content, exclusive=fresh)
        except FileExistsError:
            raise ConfigError(_taken(str(out_dir))) from None
        if not fresh:
            _cut_metrics(out_dir / METRICS, from_step)
            for name in (REPORT, WEIGHTS, RECALL_PNG):  # they would tell of another end
                (out_dir / name).unlink(missing_ok=True)


def loss_of(out_dir: Path) -> Callable[[], bool]:
    """A question for later: whether out_dir, which is held and claimed, was removed, emptied or replaced since."""
    descriptor = os.open(out_dir, os.O_RDONLY | os.O_DIRECTORY)  # while it is open no other directory gets its number
    mine = os.fstat(descriptor)

    def is_lost() -> bool:
        try:
            os.stat(out_dir / CONFIG)
            return not os.path.samestat(mine, os.stat(out_dir))
        except FileNotFoundError:
            return True
        except OSError:  # a network file system's hiccup
            return False

    weakref.finalize(is_lost, os.close, descriptor)
    return is_lost


def begun_in(out_dir: Path) -> dict[str, Any]:
    """What config.json says of the run that was begun in out_dir; empty where there is none that can be read."""
    try:
        return find_json(out_dir / CONFIG) or {}
    except ConfigError:
        return {}


def provenance() -> dict[str, Any]:
    """The versions of what computes, and the git commit of this program."""
    packages = {name: installed_version(name) for name in ("torch", "deepspeed", "tiktoken", "numpy", "safetensors")}
    return {
        "versions": {"python": python_version(), "nanogpt-overfit": installed_version("nanogpt-overfit"), **packages},
        "git_commit": _git_commit(),
    }


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
    back: the report shall be of the file. Raises SystemExit when there is no room, or when it holds other weights.
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
        raise SystemExit(f"error: {out_dir / WEIGHTS} cannot be written ({error}): make room, start again") from None
    if unlike:
        temporary.unlink()
        raise SystemExit(
            f"error: {out_dir / WEIGHTS}, read back, has another {unlike[0]} than was evaluated: memory or disk fail; "
            f"start again"
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
    raise ConfigError(f"{given}: no such run directory")


@dataclass(frozen=True)
class Run:
    """A finished run, read back."""

    config: TrainConfig
    report: dict[str, Any]
    model: GPT


def load_run(out_dir: str) -> Run:
    """The run in out_dir with its final weights, on the CPU. Raises ConfigError when a file is missing or damaged."""
    path = run_directory(out_dir)
    stored = read_json(path / CONFIG, of=FINISHED)
    report = read_json(path / REPORT, of=FINISHED)
    known = {f.name for f in fields(TrainConfig)}
    try:
        config = TrainConfig(**{k: v for k, v in stored["config"].items() if k in known})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path / CONFIG} is not a run's: {error!r}") from None
    shape = model_config(config)
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
    return Run(config, report, model.eval())


def model_config(config: TrainConfig) -> GPTConfig:
    """The shape of the model that config asks for."""
    return GPTConfig(block_size=config.block_size, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with '-dirty' where it has changed since; None where nobody knows."""
    copied = Path(__file__).parent.parent / "COMMIT"  # written by slurm/train.sh beside its copy of the code
    if copied.exists():
        return copied.read_text().strip() or None
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is the commit of whatever surrounds us
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout


def _taken(out_dir: str) -> str:
    return f"--out_dir={out_dir} already holds a run: name another directory"
