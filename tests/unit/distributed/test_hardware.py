"""What a token costs, and what share of the device's peak a run reaches."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.runs import ALONE, run
from nanogpt.distributed.hardware import PEAKS, best_dtype, table_peak
from nanogpt.model.gpt import GPT, GPTConfig, flops_per_token


@pytest.mark.parametrize("context_length", [8, 64])
def test_flops_are_those_that_torch_counts(context_length):
    """Reference: torch's FLOP counter over forward and backward, exactly."""
    config = GPTConfig(block_size=64, vocab_size=101, n_layer=3, n_head=2, n_embd=32)
    idx = torch.randint(config.vocab_size, (2, context_length))
    model = GPT(config)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    assert counter.get_total_flops() == idx.numel() * flops_per_token(config, context_length=context_length)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_device_is_found_by_its_name(name, found):
    """Reference: the table; a longer name counts before a shorter one that it contains."""
    assert table_peak(name, "bf16") == PEAKS[found]["bf16"]


def test_fp32_is_fp32(tmp_path):
    """Invariant: not TF32, where the environment would have it, as it does in NVIDIA's images."""
    code = (
        "import torch; print(torch.get_float32_matmul_precision());"
        "from nanogpt.distributed.world import World; World.from_env();"
        "print(torch.get_float32_matmul_precision())"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, env={"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"})
    assert done.stdout.split() == ["high", "highest"], done.stderr


def test_an_unknown_device_has_no_peak():
    """Invariant: no guess, neither for a name nor for a precision that a device lacks."""
    for name in ("Some GPU of 2031", "NVIDIA RTX A4000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GB200"):
        assert table_peak(name, "bf16") is None
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti"):
        assert table_peak(name, "bf16") is None
    assert table_peak("Tesla V100-SXM2-16GB", "bf16") is None


def test_every_rank_finds_the_same_dtype():
    """Invariant: asked several times a machine gives one answer, as its ranks must, and keeps its threads."""
    threads = torch.get_num_threads()
    assert len({best_dtype(ALONE) for _ in range(4)}) == 1
    assert torch.get_num_threads() == threads
