"""The SHA-256 of a file that is too large to be read at once.

file_sha256(Path("out/model.safetensors"))
"""

import hashlib
from pathlib import Path

BLOCK_BYTES = 2**20


def file_sha256(path: Path) -> str:
    """Of path as it is on disk now, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()  # hashlib.file_digest wants Python 3.11
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
