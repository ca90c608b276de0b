"""What a large file or tensor holds, as a few bytes that can be compared.

file_sha256(Path("out/model.safetensors"))
fingerprint(model.lm_head.weight)
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanogpt.files import regular

BLOCK_BYTES = 2**20
COLUMNS = 1024  # of the square that a tensor is laid out in, in words of two values


def file_sha256(path: Path) -> str:
    """Of path as it is on disk now, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()  # hashlib.file_digest wants Python 3.11
    with open(path, "rb", opener=regular) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(values: Tensor) -> bytes:
    """16 bytes that tell values, of any shape and on any device, from others in any bit of their fp32 form.

    A hash of the sums of all rows and all columns of their bits, which the device makes at the speed of its memory:
    whole numbers, modulo 2^64, so they are the same in any order. Changes in up to three words always show; more would
    have to cancel in each row and each column.
    """
    flat = values.detach().float().reshape(-1)
    if flat.storage_offset() % 2:  # a word would be cut
        flat = flat.clone()
    whole = flat.numel() // (2 * COLUMNS) * (2 * COLUMNS)
    rest = pad(flat[whole:], (0, 2 * COLUMNS - (flat.numel() - whole)))
    rows = flat[:whole].view(torch.int64).view(-1, COLUMNS)
    sums = torch.cat([rows.sum(dim=1), rows.sum(dim=0), rest.view(torch.int64)])
    return hashlib.blake2b(sums.cpu().numpy().tobytes(), digest_size=16).digest()
