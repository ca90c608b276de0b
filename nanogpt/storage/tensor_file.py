"""Writes safetensors files that others may read as they may any other file of this process."""

import hashlib
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from nanogpt.config.files import regular


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError or SafetensorError when there is no room."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode & 0o777  # as the umask has it
    save_file(tensors, path, metadata={"format": "pt"})
    with suppress(OSError):  # some file systems know no modes
        path.chmod(mode)  # the library makes it readable by its owner alone


BLOCK_BYTES = 2**20


def file_sha256(path: Path) -> str:
    """Of path as it is on disk now, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()  # hashlib.file_digest wants Python 3.11
    with open(path, "rb", opener=regular) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
