"""The run directory, a contract with other programs: config.json, metrics.jsonl, report.json, model.safetensors.

run = load_run("out")
run.model, run.config, run.report["loss"]
"""

import json
import os
import subprocess
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanogpt.config import TrainConfig
from nanogpt.errors import ConfigError
from nanogpt.model import GPT, GPTConfig
from nanogpt.strict_json import write_json

CONFIG, METRICS, REPORT, WEIGHTS = "config.json", "metrics.jsonl", "report.json", "model.safetensors"
TIED = "lm_head.weight"  # the same tensor as transformer.wte.weight, which is the one that is stored


def check_free(out_dir: str) -> Path:
    """out_dir as a path that a run can be written to, without making anything. Raises ConfigError."""
    path = Path(os.path.abspath(os.path.expanduser(out_dir)))
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))  # of those that exist
    try:
        if any((path / name).exists() for name in (CONFIG, METRICS, REPORT, WEIGHTS)):
            raise ConfigError(_taken(out_dir))
        for part in path.relative_to(nearest).parts:
            (nearest / part).exists()  # raises for a name that is too long
        with TemporaryFile(dir=nearest):  # has no name
            pass
    except OSError as error:
        raise ConfigError(f"--out_dir={out_dir} cannot be written: {error.strerror or error}") from None
    return path


def claim(out_dir: Path, config: TrainConfig, **facts: Any) -> None:
    """Make out_dir this run's by writing its config.json: the resolved options, what they run on, the versions.

    Raises ConfigError when another run was first.
    """
    packages = {name: _version(name) for name in ("torch", "tiktoken", "numpy", "safetensors")}
    content = {
        "config": asdict(config),
        **facts,
        "versions": {"python": python_version(), "nanogpt-overfit": _version("nanogpt-overfit"), **packages},
        "git_commit": _git_commit(),
    }
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / CONFIG, content, exclusive=True)
    except FileExistsError:
        raise ConfigError(_taken(str(out_dir))) from None
    except OSError as error:
        raise ConfigError(f"--out_dir={out_dir} cannot be written: {error.strerror or error}") from None


def save_weights(out_dir: Path, model: GPT) -> None:
    """model.safetensors: every parameter in fp32, the tied one once."""
    state = {name: value.contiguous().cpu() for name, value in model.state_dict().items() if name != TIED}
    temporary = out_dir / (WEIGHTS + ".tmp")
    save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, out_dir / WEIGHTS)


@dataclass(frozen=True)
class Run:
    """A finished run, read back."""

    config: TrainConfig
    report: dict[str, Any]
    model: GPT


def load_run(out_dir: str) -> Run:
    """The run in out_dir with its final weights, on the CPU. Raises ConfigError when a file is missing or damaged."""
    path = Path(out_dir)
    if not os.path.isdir(path):
        raise ConfigError(f"{out_dir}: no such run directory")
    stored = _read_json(path / CONFIG)
    report = _read_json(path / REPORT)
    known = {f.name for f in fields(TrainConfig)}
    try:
        config = TrainConfig(**{k: v for k, v in stored["config"].items() if k in known})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path / CONFIG} is not a run's: {error!r}") from None
    model = GPT(model_config(config))
    try:
        state = load_file(path / WEIGHTS)
        state[TIED] = state["transformer.wte.weight"]
        model.load_state_dict(state)
    except FileNotFoundError:
        raise ConfigError(f"{path / WEIGHTS}: no such file: has the run ended?") from None
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{path / WEIGHTS} is damaged or of another model: {str(error).splitlines()[0]}") from None
    return Run(config, report, model.eval())


def model_config(config: TrainConfig) -> GPTConfig:
    """The shape of the model that config asks for."""
    return GPTConfig(block_size=config.block_size, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: is {path.parent} the directory of a finished run?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with '-dirty' where it has changed since; None outside a repository."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is the commit of whatever surrounds us
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout


def _taken(out_dir: str) -> str:
    return f"--out_dir={out_dir} already holds a run: name another directory, or remove that one"
