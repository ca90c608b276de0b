"""What only a machine with a GPU can show: the same program there, by the same code."""

import os

import pytest
import torch

from conftest import TINY, flags, metrics, report, torchrun, train

ALL_GPUS = ",".join(map(str, range(torch.cuda.device_count())))
GPUS = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ALL_GPUS)}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpu_follows_the_cpus_curve(tmp_path):
    """Reference: the CPU's fp32 curve; 1e-3, as a GPU's matrix products round in another order."""
    options = TINY | {"max_steps": 20, "log_every": 1, "dtype": "fp32", "compile": "false"}
    assert train(*flags(**options, out_dir="gpu"), cwd=tmp_path, env=GPUS).returncode == 3
    assert train(*flags(**options, out_dir="cpu"), cwd=tmp_path, env={}).returncode == 3
    for a, b in zip(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_a_gpu_reaches_the_target(tmp_path):
    """Invariant: bf16 and torch.compile, the defaults there, reach a verified target."""
    done = train(*flags(**TINY, max_steps=600, out_dir="out"), cwd=tmp_path, timeout=600, env=GPUS)
    assert done.returncode == 0, done.stdout + done.stderr
    told = report(tmp_path / "out")
    assert (told["reached"], told["dtype"], told["compiled"]) == (True, "bf16", True)


def test_nccl_ranks_follow_one_process(tmp_path):
    """Reference: one GPU; as many ranks as there are GPUs."""
    if (ranks := torch.cuda.device_count()) < 2:
        pytest.skip("needs two GPUs")
    options = TINY | {"max_steps": 20, "log_every": 1, "dtype": "fp32", "compile": "false"}
    assert train(*flags(**options, out_dir="one"), cwd=tmp_path, env=GPUS).returncode == 3
    torchrun(ranks, *flags(**options, out_dir="all"), cwd=tmp_path, env=GPUS)
    for a, b in zip(metrics(tmp_path / "all"), metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_zero_on_a_gpu_follows_one_process(stage, tmp_path):
    """Reference: the single engine on the same GPU; 1e-4, as a reduction of one rank changes nothing but the order."""
    options = TINY | {"max_steps": 20, "log_every": 1, "dtype": "fp32", "compile": "false"}
    assert train(*flags(**options, out_dir="one"), cwd=tmp_path, env=GPUS).returncode == 3
    words = ("--engine=deepspeed", f"--zero_stage={stage}")
    assert train(*words, *flags(**options, out_dir="zero"), cwd=tmp_path, env=GPUS).returncode == 3
    for a, b in zip(metrics(tmp_path / "zero"), metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_more_ranks_than_gpus_are_refused(tmp_path):
    """Invariant: a rank without a GPU of its own is one line, not a crash in NCCL."""
    done = torchrun(torch.cuda.device_count() + 1, *flags(**TINY), cwd=tmp_path, env=GPUS)
    assert done.returncode != 0
    assert f"--nproc_per_node={torch.cuda.device_count()}" in done.stderr
    assert not (tmp_path / "out").exists()
