"""The health check names who is wrong or slow, and costs seconds. A really slow link is in tests/slurm."""

import re
from dataclasses import replace

import pytest

from harness.runs import ALONE, SHORT, flags, torchrun
from nanogpt.distributed.health_check import Health, judge

WELL = Health("node1", "H100", False, 600.0, True, 100.0, True, 50.0)
FOUR = [WELL, WELL, replace(WELL, host="node2"), replace(WELL, host="node2")]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"lacks_gpu": True}, "although the job has GPUs"),
        ({"device": "A100"}, "A100, most ranks have H100"),
        ({"matmul_is_exact": False}, "matmul gives wrong numbers"),
        ({"all_reduce_is_exact": False}, "all-reduce gives wrong numbers"),
        ({"matmul_tflops": 300.0}, "matmul 300 TFLOP/s, the median is 600"),
        ({"receive_gbps": 5.0}, "5 GB/s from rank 2 on node2, the median of such links is 27.5"),
    ],
)
def test_each_fault_is_named(fault, said):
    """Invariant: one line, with the rank, its host and what is wrong; nothing is said of the others."""
    (line,) = judge([*FOUR[:3], replace(FOUR[3], **fault)])
    assert line.startswith("rank 3 on node2: ")
    assert said in line


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 26, model 2)"),
        ("cpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon 8175M @ 2.5GHz\n", "Xeon 8175M @ 2.5GHz"),
        (
            "cpu family\t: 6\nmodel\t\t: 79\nmodel name\t: Xeon(R) CPU @ 2.20GHz\n",
            "Xeon(R) CPU @ 2.20GHz (family 6, model 79)",
        ),
        ("model name\t: AMD EPYC\n", "AMD EPYC"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "cpu"),  # an ARM core's has no name
        (None, "cpu"),  # no /proc
    ],
)
def test_a_processor_s_generation_is_told(says, name, tmp_path, monkeypatch):
    """Invariant: an x86 name without a model number is told with family and model; the first core's, of several."""
    if says is not None:
        (tmp_path / "cpuinfo").write_text(f"{says}\nmodel name\t: another core's\n")
    monkeypatch.setattr("nanogpt.distributed.world.CPU_INFO", tmp_path / "cpuinfo")
    assert ALONE.device_name() == name


def test_links_within_a_node_are_not_those_between_nodes():
    """Invariant: a network that is slower than the link between two GPUs of a node is no fault."""
    slow_network = [replace(r, receive_gbps=3.0 if i % 2 == 0 else 300.0) for i, r in enumerate(FOUR)]
    assert judge(FOUR) == judge(slow_network) == []


def test_healthy_ranks_are_found_right(tmp_path):
    """Invariant: real products and sums of two ranks are exact, and the check takes less than 10 s."""
    done = torchrun(2, *flags(**SHORT, health="warn", max_steps=1), cwd=tmp_path)
    found = re.search(r"health: 2 ranks on 1 nodes, .* TFLOP/s, all-reduce .* GB/s, .*; (.+) s\n", done.stdout)
    assert float(found[1]) < 10
    assert "wrong numbers" not in done.stdout
    assert (tmp_path / "out" / "report.json").exists()


def test_strict_does_not_train(tmp_path):
    """Invariant: a rank without the GPU that Slurm gave it ends the run in one line before a file is written."""
    options = flags(**SHORT, health="strict", max_steps=1)
    done = torchrun(2, *options, cwd=tmp_path, env={"SLURM_GPUS_ON_NODE": "2"})
    assert done.returncode != 0
    (line,) = re.findall(r"^error: --health=strict: .*$", done.stderr, re.MULTILINE)
    for rank in (0, 1):
        assert re.search(rf"rank {rank} on \S+: .* although the job has GPUs there", line)
    assert list(tmp_path.iterdir()) == []
