"""Checkpoint files: whole or refused, whatever happens to them, and readable in any cut."""

import json
import os
import re
import shutil
from io import BytesIO
from pathlib import Path

import pytest
import torch

from harness.runs import ALONE, free_port
from nanogpt.config.errors import ConfigError
from nanogpt.distributed.world import World
from nanogpt.storage.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    Piece,
    abandon_after,
    newest_intact,
)

VALUES = torch.arange(100, dtype=torch.float32)


def save(out_dir, step, *, keep=3):
    """A checkpoint of one tensor, cut in three, with step added to its values."""
    cuts = [Piece("weight/a", start, VALUES[start:stop] + step) for start, stop in ((0, 10), (10, 64), (64, 100))]
    writer = CheckpointWriter(out_dir, ALONE, keep=keep)
    writer.begin(step, cuts, {"step": step, "loss": float("nan")})
    return writer.commit()


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (0, 1), (9, 11), (10, 64), (63, 65), (99, 100), (5, 80)])
def test_any_stretch_is_read(tmp_path, start, stop):
    """Reference: the tensor itself, whatever pieces it was written in."""
    assert save(tmp_path, 7) == ""
    checkpoint, skipped = newest_intact(tmp_path)
    assert (checkpoint.step, checkpoint.progress, skipped) == (7, {"step": 7, "loss": None}, [])
    assert torch.equal(checkpoint.read("weight/a", start, stop), VALUES[start:stop] + 7)


@pytest.mark.parametrize(("name", "start", "stop"), [("weight/a", 50, 101), ("weight/b", 0, 1)])
def test_what_is_not_there_is_an_error(tmp_path, name, start, stop):
    """Invariant: a checkpoint never makes up a value."""
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="holds no"):
        newest_intact(tmp_path)[0].read(name, start, stop)


def test_the_newest_are_kept_and_latest_names_the_newest(tmp_path):
    """Invariant: keep of them, no temporary files, and `latest` is right."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000003", "step_00000004"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000004\n"


def test_later_steps_are_set_aside_by_a_run_that_goes_back(tmp_path):
    """Invariant: what is saved from then on is the newest and is kept; what was there before is still on the disk."""
    for step in (2, 3):
        save(tmp_path, step, keep=2)
    latest = tmp_path / "checkpoints" / "latest"
    assert abandon_after(tmp_path, 2) == ["step_00000003"]
    assert latest.read_text() == "step_00000002\n"
    assert abandon_after(tmp_path, 1) == ["step_00000002"]
    assert newest_intact(tmp_path) == (None, [])
    assert not latest.exists()
    save(tmp_path, 1, keep=1)
    save(tmp_path, 1, keep=1)  # the same step again
    assert newest_intact(tmp_path)[0].step == 1
    assert abandon_after(tmp_path, 1) == []
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "abandoned_step_00000002", "abandoned_step_00000003", "latest", "step_00000001"
    ]  # fmt: skip


def test_a_run_counts_on_while_it_is_saved(tmp_path):
    """Invariant: a checkpoint tells of the moment when it was begun, whatever the run does with its lists after."""
    writer, history = CheckpointWriter(tmp_path, ALONE, keep=1), [(1, 3.0)]
    writer.begin(1, [Piece("weight/a", 0, VALUES)], {"history": history, "meter": {"seconds": history}})
    history.append((2, 2.0))
    assert writer.commit() == ""
    assert newest_intact(tmp_path)[0].progress == {"history": [[1, 3.0]], "meter": {"seconds": [[1, 3.0]]}}


def test_a_closed_checkpoint_lets_go_of_its_files(tmp_path):
    """Reference: what the kernel has mapped. Deleted files that are mapped keep their room on the disk."""
    save(tmp_path, 1)
    checkpoint = newest_intact(tmp_path)[0]
    assert "step_00000001" in Path("/proc/self/maps").read_text()
    value = checkpoint.read("weight/a", 0, 100)
    checkpoint.close()
    assert "step_00000001" not in Path("/proc/self/maps").read_text()
    assert torch.equal(value, VALUES + 1)


def test_a_writer_that_fails_completes_nothing(tmp_path, monkeypatch):
    """Invariant: whatever error ends the thread, there is a failure, and the checkpoint before stays the newest."""
    cuts = [Piece("weight/a", 0, VALUES)]
    writer = CheckpointWriter(tmp_path, ALONE, keep=1)
    writer.begin(1, cuts, {})
    assert writer.commit() == ""

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr("nanogpt.storage.checkpoint.save_tensors", out_of_memory)
    writer.begin(2, cuts, {})
    assert writer.commit() == "MemoryError"
    assert newest_intact(tmp_path)[0].step == 1


def test_a_copy_is_saved_not_what_the_weights_become(tmp_path):
    """Invariant: training goes on while the thread writes, and changes nothing of what is written."""
    weights = torch.zeros(2**20)
    writer = CheckpointWriter(tmp_path, ALONE, keep=1)
    writer.begin(1, [Piece("weight/a", 0, weights)], {})
    weights.fill_(1.0)
    assert writer.commit() == ""
    assert newest_intact(tmp_path)[0].read("weight/a", 0, 2**20).count_nonzero() == 0


def _flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def _newer(manifest):
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format": 99}))


DAMAGE = {
    "truncated": lambda d: (d / "rank_00000.safetensors").write_bytes((d / "rank_00000.safetensors").read_bytes()[:-1]),
    "flipped bit": lambda d: _flip(d / "rank_00000.safetensors", -5),
    "flipped bit in its header": lambda d: _flip(d / "rank_00000.safetensors", 20),
    "flipped bit in the manifest": lambda d: _flip(
        d / "manifest.json", (d / "manifest.json").read_text().index("step")
    ),
    "half a manifest": lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text()[:50]),
    "missing shard": lambda d: (d / "rank_00000.safetensors").unlink(),
    "missing manifest": lambda d: (d / "manifest.json").unlink(),
    "newer version": lambda d: _newer(d / "manifest.json"),
    "empty directory": lambda d: (shutil.rmtree(d), d.mkdir()),
    "another program's manifest": lambda d: (d / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_newest_intact_one_is_used(tmp_path, damage, forked):
    """Invariant: a broken checkpoint is named and passed over; with no other there is none."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "checkpoints" / "step_00000002")
    checkpoint, skipped = newest_intact(tmp_path)
    assert checkpoint.step == 1
    assert len(skipped) == 1
    assert skipped[0].startswith("step_00000002 ")
    told = forked(tmp_path, "nanogpt", "checkpoint", "verify", tmp_path)
    assert told.returncode == 1
    assert told.stdout.splitlines()[1] == "step_00000001 is intact"
    damage(tmp_path / "checkpoints" / "step_00000001")
    assert newest_intact(tmp_path)[0] is None


def test_verify_says_what_is_there(tmp_path, forked):
    """Invariant: status 0 where all are intact; a directory without any is one line and status 2."""
    told = forked(tmp_path, "nanogpt", "checkpoint", "verify", tmp_path)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "holds no checkpoint" in told.stderr
    save(tmp_path, 1)
    told = forked(tmp_path, "nanogpt", "checkpoint", "verify", tmp_path)
    assert (told.returncode, told.stdout) == (0, "step_00000001 is intact\n")


def test_a_half_written_one_is_none(tmp_path):
    """Invariant: what a kill leaves in the middle of a save has no checkpoint's name, and is written over."""
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step_00000002.tmp").mkdir()
    (tmp_path / "checkpoints" / ".step_00000002.tmp" / "rank_00000.safetensors").write_bytes(b"half")
    assert newest_intact(tmp_path)[0].step == 1
    assert save(tmp_path, 2) == ""
    assert newest_intact(tmp_path)[0].step == 2


def test_a_kill_while_one_replaces_another_loses_neither(tmp_path):
    """Invariant: between its two renames the older one of a step is still found, and what it leaves stops no save."""
    directory = tmp_path / "checkpoints"
    assert save(tmp_path, 1, keep=1) == ""
    (directory / "step_00000001").rename(directory / ".step_00000001.old")  # killed here, or ...
    checkpoint, skipped = newest_intact(tmp_path)
    assert (checkpoint.step, skipped) == (1, [])
    assert save(tmp_path, 1, keep=1) == ""
    shutil.copytree(directory / "step_00000001", directory / ".step_00000001.old")  # ... after the second one
    assert save(tmp_path, 1, keep=1) == ""
    assert sorted(p.name for p in directory.iterdir()) == ["latest", "step_00000001"]


def test_what_a_person_keeps_there_is_left_alone(tmp_path):
    """Invariant: a copy under another name is neither the newest checkpoint nor dropped when others are."""
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints" / "step_00000001", tmp_path / "checkpoints" / "step_00000001_good")
    for step in (2, 3):
        save(tmp_path, step, keep=1)
    assert newest_intact(tmp_path)[0].path.name == "step_00000003"
    assert abandon_after(tmp_path, 3) == []
    assert CheckpointReader(tmp_path / "checkpoints" / "step_00000001_good").step == 1


def test_checkpoints_that_nobody_can_list_are_not_none(tmp_path):
    """Invariant: a run does not begin again over checkpoints that are there but cannot be listed."""
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ConfigError, match="checkpoints cannot be read: Not a directory"):
        newest_intact(tmp_path)


def _save_apart(rank, port, out_dir, answers):
    """One rank of two, each of which writes to a disk of its own."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = World(rank=rank, local_rank=rank, size=2, device=torch.device("cpu"))
    with world.process_group():
        (out_dir / str(rank) / "checkpoints" / ".step_00000009.tmp").mkdir(parents=True)  # a kill has left it here
        writer = CheckpointWriter(out_dir / str(rank), world, keep=1)
        writer.begin(1, [Piece("weight/a", 50 * rank, VALUES[world.rows(100)])], {})
        answers.put(writer.commit())


def test_ranks_that_do_not_share_a_disk_complete_nothing(tmp_path):
    """Invariant: a checkpoint is complete only when the first rank sees every rank's file, or nothing stays of it."""
    context = torch.multiprocessing.get_context("spawn")
    port, answers = free_port(), context.Queue()
    ranks = [context.Process(target=_save_apart, args=(rank, port, tmp_path, answers)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for failure in [answers.get(timeout=120) for _ in ranks]:
        assert re.search(r"^rank 0 does not see .*rank_00001\.safetensors of another rank", failure)
    for rank in ranks:
        rank.join(timeout=60)
    assert newest_intact(tmp_path / "0") == newest_intact(tmp_path / "1") == (None, [])
    assert [list((tmp_path / rank / "checkpoints").iterdir()) for rank in "01"] == [[], []]


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    """Invariant: an unwritable directory is told, not raised; nothing temporary stays."""
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step_00000002.tmp").write_text("in the way")
    assert "exists" in save(tmp_path, 2)
    assert newest_intact(tmp_path)[0].step == 1


class Touch:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def test_reading_executes_nothing(tmp_path, monkeypatch):
    """Invariant: a pickle in a shard's place, which the manifest fits, is refused and not run."""

    def save_a_pickle(_, path):
        torch.save(Touch(tmp_path / "was here"), path)

    monkeypatch.setattr("nanogpt.storage.checkpoint.save_tensors", save_a_pickle)
    assert save(tmp_path, 1) == ""
    directory = tmp_path / "checkpoints" / "step_00000001"
    shard = directory / "rank_00000.safetensors"
    assert set(directory.iterdir()) == {shard, directory / "manifest.json"}
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(directory)
    assert not (tmp_path / "was here").exists()
    torch.load(BytesIO(shard.read_bytes()), weights_only=False)
    assert (tmp_path / "was here").exists(), "it would have been run"
