"""config.json: which run this is, what it runs on; which code and which versions compute.

provenance().versions["torch"]
RunInfo.read(Path("out/config.json"), of="a run").resolved_config()
"""

import hashlib
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import ResolvedConfig
from nanogpt.storage.json_file import JsonFile, SchemaError, key

PACKAGE = Path(__file__).resolve().parent.parent
EARLIER = {"optimizer": "adamw", "compile": "false"}  # of the versions that did not write these, or not what they were


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which code and which versions compute."""

    versions: Mapping[str, str | None] = key("of Python and of each package that computes; null: not installed")
    git_commit: str | None = key(
        "of this program, with -dirty where it has changed since; null where nobody knows", default=None
    )


def provenance() -> Provenance:
    """What computes in this process."""
    packages = {name: installed_version(name) for name in ("torch", "deepspeed", "tiktoken", "numpy", "safetensors")}
    versions = {"python": python_version(), "nanogpt-overfit": installed_version("nanogpt-overfit"), **packages}
    return Provenance(versions=versions, git_commit=_git_commit())


@dataclass(frozen=True, kw_only=True)
class RunInfo(JsonFile):
    """config.json: what a run is, of its newest attempt. What is marked as added may be None when it is read."""

    config: Mapping[str, object] | None = key("every option as resolved, by name", added=True)
    corpus_sha256: str | None = key("SHA-256 of the text's bytes, in hexadecimal", added=True)
    text_files: Mapping[str, str] | None = key(
        "the same of each file of the text, by its path in full or as builtin, in the order of the text", added=True
    )
    floor: float | None = key("entropy floor of the windows inside the text, nats/token", added=True)
    world_size: int | None = key("ranks", added=True)
    device: str | None = key("what each rank computes on", added=True)
    predicted_memory_bytes: float | None = key("what a rank was expected to hold at its fullest, bytes", added=True)
    deepspeed: Mapping[str, object] | None = key("DeepSpeed's settings as resolved; null without it", default=None)
    begun_with: str = key("--resume of the run's first attempt: auto, never, or a path in full", default="auto")
    resumed_from: str | None = key("the checkpoint that this attempt began from; null: step 0", default=None)
    wandb_run_id: str | None = key("of Weights & Biases, the same for all attempts", added=True)
    hosts: tuple[str, ...] | None = key("names of the machines", added=True)
    slurm_job_id: str | None = key("of the Slurm job; null outside one", default=None)
    code: Provenance | None = key("which code and versions compute", added=True, merged=True)

    def resolved_config(self) -> ResolvedConfig:
        """The options, without those that this version does not know.

        Raises SchemaError where there are none, or one is left open or out of its range.
        """
        if self.config is None:
            raise SchemaError("it has no config")
        known = {f.name for f in fields(ResolvedConfig)}
        options: dict[str, Any] = EARLIER | {name: value for name, value in self.config.items() if name in known}
        if options["compile"] == "auto":
            options["compile"] = EARLIER["compile"]
        for f in fields(ResolvedConfig):
            if f.kw_only and options.get(f.name) in (None, "auto"):
                raise SchemaError(f"it has no value for {f.name}")
        try:
            return ResolvedConfig(**options)  # which checks them
        except ConfigError as error:
            raise SchemaError(f"its options are invalid: {error}") from None
        except TypeError as error:
            raise SchemaError(repr(error)) from None


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with '-dirty' where it has changed since; None where nobody knows."""
    copied = PACKAGE.parent / "COMMIT"  # written by slurm/train.sh beside its copy of the code
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


# Variables by which libraries compute otherwise than they would by themselves.
KERNEL_CHOICES = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR",
    "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "TORCH_BLAS_PREFER_CUBLASLT",
)  # fmt: skip


PACKAGES = ("torch", "deepspeed", "tiktoken")


def what_computes() -> dict[str, str | None]:
    """Beside options and text, all that must be the same on every rank: code, versions, choices of kernels."""
    import torch  # which takes seconds: a config.json is read without it

    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return (
        {"code with SHA-256": source.hexdigest()[:16]}
        | {name: installed_version(name) for name in PACKAGES}
        | {"CUDA": torch.version.cuda}
        | {name: os.environ.get(name) for name in KERNEL_CHOICES}
    )
