"""Rows of a run: strict JSON, on the disk at once, and in words."""

import json
import math
import resource
from dataclasses import replace

import pytest

from harness.rows import ROW
from nanogpt.monitor.loggers import JsonlLogger, describe
from nanogpt.storage.json_file import finite
from nanogpt.utils.format import duration


def test_figures_that_are_not_finite_are_null(tmp_path):
    """Invariant: every line of metrics.jsonl is JSON by the standard, which knows no NaN."""
    logger = JsonlLogger(tmp_path / "metrics.jsonl", pytest.fail)
    logger.row(ROW)
    logger.row(replace(ROW, loss=math.nan, grad_norm=math.inf, full_pass_loss=-math.inf))
    logger.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert lines[0]["loss"] == 1.5
    assert [lines[1][key] for key in ("loss", "grad_norm", "full_pass_loss")] == [None, None, None]
    assert finite({"a": [1.0, math.nan, {"b": (math.inf, 2)}]}) == {"a": [1.0, None, {"b": [None, 2]}]}


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    """Invariant: a reader sees a row while the run goes on."""
    logger = JsonlLogger(tmp_path / "metrics.jsonl", pytest.fail)
    logger.row(ROW)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 10
    logger.close()


def test_rows_wait_for_room_on_the_disk(tmp_path):
    """Invariant: with the file-size limit in the middle of a row one warning; later all rows are there, whole."""
    said, before = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    logger = JsonlLogger(tmp_path / "metrics.jsonl", said.append)
    logger.row(ROW)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(ROW.to_json()) + 50, before[1]))
        logger.row(replace(ROW, step=20))
        logger.row(replace(ROW, step=30))
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    logger.row(replace(ROW, step=40))
    logger.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [10, 20, 30, 40]
    assert len(said) == 1
    assert "metrics.jsonl cannot be written" in said[0]


def test_a_row_for_a_person():
    """Reference: read by eye."""
    assert describe(ROW) == "step    10  loss 1.5000  650 tokens/s  MFU 41%  ETA 10 min (5 min to 2.0 h)"
    assert "no ETA yet" in describe(replace(ROW, eta_s=None))
    assert "MFU 41%  target below the plateau" in describe(
        replace(ROW, eta_s=None, eta_note="target below the plateau")
    )
    by_reference = replace(ROW, eta_note="by reference runs")
    assert describe(by_reference).endswith("ETA 10 min (5 min to 2.0 h, by reference runs)")
    assert describe(replace(by_reference, mfu=math.nan, eta_s=math.nan)).endswith("tokens/s  no ETA yet")
    assert "full pass 0.0985" in describe(replace(ROW, full_pass_loss=0.0985))
    verified = replace(ROW, full_pass_loss=0.0985, eta_s=0.0, eta_low_s=0.0, eta_high_s=0.0)
    assert describe(verified) == "step    10  loss 1.5000  650 tokens/s  MFU 41%  full pass 0.0985"
    assert [duration(s) for s in (None, 45, 600, 86_400)] == ["?", "45 s", "10 min", "24.0 h"]
