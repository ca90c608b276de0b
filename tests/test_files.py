"""The files of a run: strict JSON, whole or not at all, and never somebody else's."""

import json
import math
import resource
from dataclasses import replace

import pytest

from nanogpt.config import TrainConfig
from nanogpt.errors import ConfigError
from nanogpt.fence import Attempt
from nanogpt.loggers import JsonlLogger, Row, describe, duration
from nanogpt.run_dir import check_free, claim, held
from nanogpt.strict_json import finite, write_json

NO_JOB = Attempt("", 0)
ROW = Row(
    step=10, tokens=10_240, loss=1.5, lr=6e-4, grad_norm=0.7, tokens_per_s=650.0, step_s=1.6, mfu=0.41,
    eta_s=600.0, eta_low_s=300.0, eta_high_s=7200.0, eta_note=None, wall_s=15.8, memory_bytes=4_000_000_000,
    full_pass_loss=None,     fastest_rank_step_s=1.5, slowest_rank_step_s=1.5, time_share={"compute": 0.9},
)  # fmt: skip


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
    assert describe(replace(ROW, mfu=math.nan, eta_s=math.nan)).endswith("tokens/s  no ETA yet")
    assert "full pass 0.0985" in describe(replace(ROW, full_pass_loss=0.0985))
    assert [duration(s) for s in (None, 45, 600, 86_400)] == ["?", "45 s", "10 min", "24.0 h"]


def test_a_directory_is_claimed_once(tmp_path):
    """Invariant: of two runs that found the directory free, the second is refused and the first one's file stays."""
    first, second = check_free(str(tmp_path / "out")), check_free(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [], "looking leaves no trace"
    with held(first, NO_JOB):
        claim(first, TrainConfig(seed=1), fresh=True, from_step=0, floor=0.01)
        with pytest.raises(ConfigError, match="another run"), held(second, NO_JOB):
            pass
    with held(second, NO_JOB), pytest.raises(ConfigError, match="already holds a run"):
        claim(second, TrainConfig(seed=2), fresh=True, from_step=0, floor=0.01)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (content["config"]["seed"], content["floor"]) == (1, 0.01)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "config.json"]
    with pytest.raises(ConfigError, match="already holds a run"):
        check_free(str(tmp_path / "out"))


def test_a_resumed_run_drops_what_tells_of_another_end(tmp_path):
    """Invariant: report, weights and picture of the end before are gone, and metrics stay."""
    config = TrainConfig(out_dir=str(tmp_path))
    claim(tmp_path, config, fresh=True, from_step=0)
    for name in ("metrics.jsonl", "report.json", "model.safetensors", "recall.png"):
        (tmp_path / name).touch()
    claim(tmp_path, config, fresh=False, from_step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl"]


def test_looking_leaves_directories_that_were_there(tmp_path):
    """Invariant: an existing directory, empty or not, is as it was."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    check_free(str(tmp_path / "there"))
    check_free(str(tmp_path / "there" / "a" / "b"))
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Invariant: content that is not JSON raises and changes nothing."""
    write_json(tmp_path / "report.json", {"loss": 1.0})
    with pytest.raises(TypeError):
        write_json(tmp_path / "report.json", {"loss": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"loss": 1.0}
