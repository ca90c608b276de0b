"""Where a run's time went, by its rows."""

import math
from socket import gethostname

import pytest

from harness.forks import forked_ranks, train
from harness.lanes import slow
from harness.runs import SHORT, TRAIN, flags, metrics, report
from nanogpt.monitor.meters import SHARES


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_a_row_says_where_the_time_went(ranks, tmp_path):
    """Invariant: shares of one wall clock, ranks in order, and MFU from the figures beside it."""
    options = flags(**SHORT, dtype="fp32", max_steps=20, log_every=5, out_dir="out")
    done = train(*options, cwd=tmp_path) if ranks == 1 else forked_ranks(ranks, tmp_path, TRAIN, *options)
    told = report(tmp_path / "out")
    for row in metrics(tmp_path / "out"):
        assert set(row["time_share"]) == set(SHARES)
        assert all(share >= 0 for share in row["time_share"].values()), row
        assert 0.5 < sum(row["time_share"].values()) <= 1, done.stdout
        assert row["fastest_rank_step_s"] <= row["slowest_rank_step_s"]
        expected = told["flops_per_token"] * row["tokens_per_s"] / told["peak_flops_per_s"]
        assert math.isclose(row["mfu"], expected)
        assert (row["time_share"]["communication"] > 0) == (ranks > 1)
        if ranks == 1:
            assert row["fastest_rank_step_s"] == row["slowest_rank_step_s"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_slow_rank_is_named(stage, tmp_path):
    """Invariant: with a rank whose forward takes longer, rows and one warning say which it is.

    Where the engine does not tell what a rank waits for; else it is the time of `test_a_row_says_where_the_time_went`.
    """
    options = SHORT | {"engine": "deepspeed", "zero_stage": stage, "dtype": "fp32", "max_steps": 8, "log_every": 1}
    words = flags(**options, inject="slow:rank=1,step=1", out_dir="out")
    done = forked_ranks(2, tmp_path, TRAIN, *words, NANOGPT_ALLOW_FAULTS="1")
    rows = metrics(tmp_path / "out")[1:]  # what is done for the first time takes each rank its own time
    assert {(row["slowest_rank"], row["slowest_rank_host"]) for row in rows} == {(1, gethostname())}, rows
    assert min(row["slowest_rank_ratio"] for row in rows) > 1.2
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning: slow for ")]
    assert f"rank 1 on {gethostname()}" in line
    assert "rank 0" not in line
