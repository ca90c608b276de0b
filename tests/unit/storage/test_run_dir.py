"""A run directory is one run's: claimed once, whole or not at all, and gone on with from its last step."""

import json
import os
from dataclasses import asdict

import pytest
import torch

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.storage.json_file import write_json
from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.run_dir import check_free, run_directory, write_config
from nanogpt.storage.run_lock import Attempt, hold_run_dir
from nanogpt.storage.tensor_file import save_tensors

NO_JOB = Attempt("", 0)


def test_a_directory_is_claimed_once(tmp_path):
    """Invariant: of two runs that found the directory free, the second is refused and the first one's file stays."""
    first, second = check_free(str(tmp_path / "out")), check_free(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [], "looking leaves no trace"
    with hold_run_dir(first, NO_JOB):
        write_config(first, RunInfo(config=asdict(TrainConfig(seed=1)), floor=0.01), fresh=True, from_step=0)
        with pytest.raises(ConfigError, match="another run"), hold_run_dir(second, NO_JOB):
            pass
    with hold_run_dir(second, NO_JOB), pytest.raises(ConfigError, match="already holds a run"):
        write_config(second, RunInfo(config=asdict(TrainConfig(seed=2))), fresh=True, from_step=0)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (content["config"]["seed"], content["floor"]) == (1, 0.01)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "config.json"]
    with pytest.raises(ConfigError, match="already holds a run"):
        check_free(str(tmp_path / "out"))


def test_a_resumed_run_drops_what_tells_of_another_end(tmp_path):
    """Invariant: report, weights and picture of the end before are gone, and metrics stay."""
    info = RunInfo(config=asdict(TrainConfig(out_dir=str(tmp_path))))
    write_config(tmp_path, info, fresh=True, from_step=0)
    for name in ("metrics.jsonl", "report.json", "model.safetensors", "recall.png"):
        (tmp_path / name).touch()
    write_config(tmp_path, info, fresh=False, from_step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl"]


def test_looking_leaves_directories_that_were_there(tmp_path):
    """Invariant: an existing directory, empty or not, is as it was."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    check_free(str(tmp_path / "there"))
    check_free(str(tmp_path / "there" / "a" / "b"))
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes.txt"]


def test_runs_beside_a_missing_one_are_named(tmp_path):
    """Invariant: whoever names a run that is not there hears of those that are; of none where there is none."""
    with pytest.raises(ConfigError, match=r"out: no such run directory$"):
        run_directory(str(tmp_path / "out"))
    for name in ("demo", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").touch()
    with pytest.raises(ConfigError, match=r"no such run directory; those beside it: demo, other$"):
        run_directory(str(tmp_path / "out"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Invariant: content that is not JSON raises and changes nothing."""
    write_json(tmp_path / "report.json", {"loss": 1.0})
    with pytest.raises(TypeError):
        write_json(tmp_path / "report.json", {"loss": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"loss": 1.0}


def test_a_resumed_run_keeps_the_whole_rows_before_its_step(tmp_path):
    """Invariant: rows from the step on, a damaged one and what follows it are dropped; the others stay to the byte."""
    rows = b'{"step": 1}\n{"step": 2}\n'
    for rest in (
        b'{"step": 3}\n',
        b'{"step": 2',
        b"",
        b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
        b"\0" * 2**21,
    ):
        (tmp_path / "metrics.jsonl").write_bytes(rows + rest)
        write_config(tmp_path, RunInfo(), fresh=False, from_step=3)
        assert (tmp_path / "metrics.jsonl").read_bytes() == rows


@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
def test_what_is_written_has_the_mode_that_the_umask_leaves(tmp_path, umask):
    """Reference: a file that open() makes, a directory that mkdir() makes; above them lies one that all may write."""
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    before = os.umask(umask)
    try:
        (tmp_path / "file").touch()
        save_tensors({"a": torch.zeros(3)}, out / "model.safetensors")
        save_tensors({"a": torch.ones(3)}, out / "model.safetensors")
        write_json(out / "report.json", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "file").stat().st_mode}
