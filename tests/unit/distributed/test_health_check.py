"""The health check names who is wrong or slow."""

from dataclasses import replace

import pytest

from harness.runs import ALONE
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
        ({"matmul_tflops": 300.0}, "matmul 300 TFLOP/s, the median is 600 TFLOP/s"),
        ({"receive_gbps": 5.0}, "5 GB/s from rank 2 on node2, the median of such links is 27.5 GB/s"),
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
