"""A fingerprint tells every bit, who differs is named, and what is written is what was evaluated."""

import pytest
import torch

from nanogpt.config.errors import RunError
from nanogpt.distributed.replicas import fingerprint, who_differs
from nanogpt.storage.run_dir import save_weights
from nanogpt.storage.tensor_file import save_tensors


def test_the_report_is_of_the_file_that_was_written(tmp_path, monkeypatch):
    """Invariant: weights other than those of the full pass, by memory or disk, are refused, and no file is left."""
    state = {"transformer.wte.weight": torch.randn(50, 8)}
    evaluated = {name: fingerprint(weight) for name, weight in state.items()}
    save_weights(tmp_path, state, evaluated)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"differs from the evaluated weights in transformer\.wte\.weight"):
        save_weights(tmp_path, {name: weight + 1e-6 for name, weight in state.items()}, evaluated)

    def flip_on_disk(tensors, path):
        save_tensors(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr("nanogpt.storage.run_dir.save_tensors", flip_on_disk)
    with pytest.raises(RunError, match="differs from the evaluated weights"):
        save_weights(tmp_path, state, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(1,), (7,), (2048,), (2049,), (50, 41), (300, 33)])
def test_a_fingerprint_tells_every_bit(shape):
    """Invariant: any one bit and a reversal change it; a copy, a view and the same values in bf16 do not."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    prints = {fingerprint(values)}
    same = [values.clone(), torch.cat([torch.zeros(1), values.view(-1)])[1:], values.bfloat16()]
    assert {fingerprint(other) for other in same} == prints
    others = 0
    for at in {0, values.numel() // 2, values.numel() - 1}:
        for bit in (0, 15, 31):
            other = values.clone().view(torch.int32).view(-1)
            other[at] ^= torch.tensor(1 << bit).to(torch.int32)
            prints.add(fingerprint(other.view(torch.float32)))
            others += 1
    if values.numel() > 1:
        prints.add(fingerprint(values.view(-1).flip(0)))
        others += 1
    assert len(prints) == 1 + others


def test_who_differs():
    """Reference: read by eye."""
    assert who_differs([b"a", b"a", b"b"]) == "rank 2 differs from the other 2 ranks"
    assert who_differs([b"a", b"b", b"c", b"b", b"b"]) == "ranks 0, 2 differ from the other 3 ranks"
    assert who_differs([b"a", b"b"]) == "ranks 0, 1 do not all hold the same"
    assert who_differs([*range(12)]) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more do not all hold the same"
