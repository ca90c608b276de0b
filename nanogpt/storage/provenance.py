"""Which code and which versions compute.

provenance()["versions"]["torch"]
"""

import hashlib
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent


def provenance() -> dict[str, Any]:
    """The versions of what computes, and the git commit of this program."""
    packages = {name: installed_version(name) for name in ("torch", "deepspeed", "tiktoken", "numpy", "safetensors")}
    return {
        "versions": {"python": python_version(), "nanogpt-overfit": installed_version("nanogpt-overfit"), **packages},
        "git_commit": _git_commit(),
    }


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
    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return (
        {"code with SHA-256": source.hexdigest()[:16]}
        | {name: installed_version(name) for name in PACKAGES}
        | {"CUDA": torch.version.cuda}
        | {name: os.environ.get(name) for name in KERNEL_CHOICES}
    )
