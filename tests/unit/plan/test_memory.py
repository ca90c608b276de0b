"""Predicted memory against what processes held, and what is said where it does not suffice."""

import json
import resource
import subprocess
import sys

import pytest
import torch

from harness.runs import ALONE, REPOSITORY, report
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed import hardware
from nanogpt.distributed.hardware import free_bytes
from nanogpt.distributed.world import PROCESS_STATUS, World
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.plan import memory
from nanogpt.plan.memory import evaluation_rows, predict_memory, shortage, with_copy_on_gpu
from nanogpt.plan.plan import make_plan


def test_a_run_holds_what_was_predicted(finished):
    """Reference: the kernel's count of a finished run's peak, to 20 %: gaps in a process's memory differ that much."""
    run_dir, said = finished
    predicted = json.loads((run_dir / "config.json").read_text())["predicted_memory_bytes"]
    assert predicted == pytest.approx(report(run_dir)["peak_memory_bytes"][0], rel=0.2)
    assert f"about {predicted / 1e9:.1f} GB of memory a rank" in " ".join(said.split())


@pytest.mark.skipif(not PROCESS_STATUS.exists(), reason="the kernel gives no peak of a process's own")
def test_a_peak_is_not_the_launcher_s():
    """Invariant: a run's peak does not grow with the memory of the process that launched it."""
    says = "from nanogpt.distributed.world import World; print(World.from_env().peak_memory_bytes())"
    launcher = f"import subprocess, sys; held = b'x' * 2_000_000_000; subprocess.run([sys.executable, '-c', {says!r}])"
    said = subprocess.run([sys.executable, "-c", launcher], cwd=REPOSITORY, capture_output=True, check=True)
    assert 50e6 < int(said.stdout) < 1e9


@pytest.mark.parametrize("says", [None, "Name:\tpython\nVmRSS:\t  100 kB\n"])
def test_a_kernel_that_gives_no_peak_of_a_process_s_own(says, tmp_path, monkeypatch):
    """Reference: getrusage's, in bytes; without /proc, and in sandboxes whose /proc says less."""
    status = tmp_path / "status"
    if says:
        status.write_text(says)
    monkeypatch.setattr("nanogpt.distributed.world.PROCESS_STATUS", status)
    unit = 1 if sys.platform == "darwin" else 1024
    assert ALONE.peak_memory_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_what_is_shared_out_adds_up():
    """Reference: ZeRO's own count (arXiv 1910.02054): 16 bytes a parameter, a 4-byte master where it is sharded."""
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=64)
    parameters = GPT(shape).num_parameters()
    assert shape.num_parameters == parameters
    sums = {}
    for stage in (0, 1, 2, 3):
        config = TrainConfig(n_layer=2, n_head=2, n_embd=64, engine="deepspeed", zero_stage=stage, dtype="fp32")
        plan = make_plan(config, World(rank=0, local_rank=0, size=4, device=torch.device("cpu")))
        sums[stage] = plan.memory.weights + plan.memory.gradients + plan.memory.optimizer
    bytes_each = {0: 16, 1: 8 + 12 / 4, 2: 4 + 16 / 4, 3: 20 / 4}
    assert sums == pytest.approx({stage: parameters * each for stage, each in bytes_each.items()}, abs=4)


def test_muon_s_stack_has_a_share_for_every_rank():
    """Reference: optim/muon.py: one layer's matrices are padded to two shares, and not to eight."""
    config = TrainConfig(
        n_layer=1, n_head=1, n_embd=768, context_length=8, stride=8, subset_tokens=99, micro_batch_size=1,
        optimizer="muon", engine="ddp", dtype="fp32",
    )  # fmt: skip
    alone, of_two, of_eight = (
        predict_memory(config, world_size=ranks, device_type="cpu", deepspeed=None).buffers for ranks in (1, 2, 8)
    )
    assert of_two - alone == 12 * 768**2 * 4
    assert of_eight == alone


def test_a_model_that_does_not_fit_is_told_before_it_is_built(tmp_path, monkeypatch):
    """Invariant: the proposed micro-batch fits and the next larger does not; where none fits that is said."""
    monkeypatch.setattr(hardware, "MEMINFO", tmp_path / "meminfo")  # of a machine whose memory nobody else takes
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 24000000 kB\nMemAvailable: 20000000 kB\n")
    free = free_bytes(ALONE)
    assert free == 20_480_000_000
    plan = make_plan(TrainConfig(dtype="fp32"), ALONE)
    assert shortage(plan.config, ALONE, None) == ""
    assert plan.memory.total < free
    huge = make_plan(TrainConfig(n_embd=12288, n_layer=96), ALONE)
    assert len(huge.warnings) == 1
    assert "no --micro_batch_size makes it fit" in huge.warnings[0]
    wide = make_plan(TrainConfig(batch_size=2**16, n_layer=1, n_embd=48, context_length=64), ALONE)
    (warning,) = wide.warnings
    fitting = int(warning.split("--micro_batch_size=")[1].split()[0])

    def need(rows):
        config = TrainConfig(**(vars(wide.config) | {"micro_batch_size": rows}))
        return predict_memory(config, world_size=1, device_type="cpu", deepspeed=None).total

    assert need(fitting) <= free < need(2 * fitting)
    odd = TrainConfig(**(vars(wide.config) | {"batch_size": 3**10, "micro_batch_size": 3**10}))
    fitting = int(shortage(odd, ALONE, None).split("--micro_batch_size=")[1].split()[0])
    assert 3**10 % fitting == 0
    assert need(fitting) <= free < need(3 * fitting)


def test_every_measured_cell_is_within_a_quarter():
    """Reference: recorded peaks of three models, with every engine that takes them, whatever the formula is now."""
    measured = REPOSITORY / "benchmarks" / "results" / "predicted_memory.zen5.2026-12-01.json"
    for cell in json.loads(measured.read_text())["cells"]:
        ranks = cell["ranks"]
        plan = make_plan(
            TrainConfig(**cell["options"]),
            World(rank=0, local_rank=0, size=ranks, device=torch.device("cpu"), local_size=ranks),
        )
        assert plan.memory.total == pytest.approx(max(cell["peak_memory_bytes"]), rel=0.25), cell["engine"]


def test_a_gpu_evaluates_as_many_windows_as_fit(monkeypatch):
    """Reference: by hand, 256 windows of 64 tokens are 16,384, each with three times its logits in fp32."""
    config = make_plan(TrainConfig(dtype="fp32"), ALONE).config
    need = predict_memory(config, world_size=1, device_type="cuda", deepspeed=None)
    gpu, enough = World(0, 0, 1, torch.device("cuda", 0)), need.total + 256 * 64 * 3 * 4 * 50_257
    for free, rows in ((enough, 256), (enough - 1, 16), (None, 16)):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        assert evaluation_rows(config, need, gpu) == rows
        assert evaluation_rows(config, need, ALONE) == 16
    longer = make_plan(TrainConfig(dtype="fp32", context_length=1024, subset_tokens=None), ALONE).config
    assert evaluation_rows(longer, need, gpu) == 16


def test_a_gpu_holds_a_checkpoint_s_copy_where_it_fits(monkeypatch):
    """Reference: by hand, 16 bytes a parameter over the ranks; beside the rest, a tenth more of it and a full pass."""
    config = make_plan(TrainConfig(dtype="fp32"), ALONE).config
    need = predict_memory(config, world_size=1, device_type="cuda", deepspeed=None)
    assert need.checkpoint == 0
    gpu, two = World(0, 0, 1, torch.device("cuda", 0)), World(0, 0, 2, torch.device("cuda", 0))
    copy = 16 * 152_791_296
    wide, narrow = (windows * 64 * 3 * 4 * 50_257 for windows in (256, 16))
    enough = int(1.1 * (need.total + wide)) + copy + 1
    for free, rows, held in (
        (enough, 256, copy),
        (enough - 2, 256, 0),  # a full pass of as many windows as fit comes first
        (int(1.1 * (need.total + narrow)) + copy + 1, 16, copy),
        (None, 16, 0),
    ):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        assert evaluation_rows(config, need, gpu) == rows
        found = with_copy_on_gpu(config, need, gpu)
        assert (found.checkpoint, found.total) == (held, need.total + held)
    monkeypatch.setattr(memory, "free_bytes", lambda _: enough)
    assert with_copy_on_gpu(config, need, two).checkpoint == copy // 2
    on_cpu = predict_memory(config, world_size=1, device_type="cpu", deepspeed=None)
    assert with_copy_on_gpu(config, on_cpu, ALONE) == on_cpu
    assert on_cpu.checkpoint == copy
