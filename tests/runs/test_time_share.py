"""Where a run's time went, by its rows."""

import math

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
