"""The health check of real ranks costs seconds. A really slow link is in tests/slurm."""

import re

import pytest

from harness.forks import forked_ranks
from harness.runs import SHORT, TRAIN, flags


@pytest.mark.slow
def test_healthy_ranks_are_found_right(tmp_path):
    """Invariant: real products and sums of two ranks are exact, and the check takes less than 10 s."""
    done = forked_ranks(2, tmp_path, TRAIN, *flags(**SHORT, health="warn", max_steps=1))
    found = re.search(r"health: 2 ranks on 1 node, .* TFLOP/s, all-reduce .* GB/s, .*; (.+) s\n", done.stdout)
    assert float(found[1]) < 10
    assert "wrong numbers" not in done.stdout
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.slow
def test_strict_does_not_train(tmp_path):
    """Invariant: a rank without the GPU that Slurm gave it ends the run in one line before a file is written."""
    options = flags(**SHORT, health="strict", max_steps=1)
    done = forked_ranks(2, tmp_path, TRAIN, *options, SLURM_GPUS_ON_NODE="2")
    assert done.returncode != 0
    (line,) = re.findall(r"^error: --health=strict: .*$", done.stderr, re.MULTILINE)
    for rank in (0, 1):
        assert re.search(rf"rank {rank} on \S+: .* although the job has GPUs on this node", line)
    assert list(tmp_path.iterdir()) == []
