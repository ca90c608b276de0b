"""Writes safetensors files that others may read as they may what stands beside them."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError or SafetensorError when there is no room."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes it readable by its owner alone
