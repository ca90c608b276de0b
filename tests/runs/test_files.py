"""The files of a run: strict JSON, whole or not at all, and never somebody else's."""

import os
import shutil
import subprocess
import sys

import pytest

from harness.runs import SHORT, TRAIN, flags, report, run
from nanogpt.config.files import LARGEST_BYTES
from nanogpt.storage.checkpoint import newest_intact
from nanogpt.storage.run_dir import load_run


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path):
    path.write_bytes(b"")
    os.truncate(path, LARGEST_BYTES + 1)


def deep(path):
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n")


def half_deep(path):
    """As deep as json reads, and too deep for what walks through it."""
    path.write_text('{"a": ' + "[" * 700 + "]" * 700 + "}\n")


STEP = "out/checkpoints/step_00000001"
READERS = {
    "out/config.json": (["nanogpt", "score", "out"], ["nanogpt", "plot", "out"]),
    "out/report.json": (["nanogpt", "score", "out"], ["nanogpt", "plot", "out"], [TRAIN]),
    "out/metrics.jsonl": (["nanogpt", "plot", "out"],),
    "out/model.safetensors": (["nanogpt", "score", "out"],),
    "hf/config.json": ([TRAIN, "--init_from=hf", "--out_dir=new"],),
    "hf/model.safetensors": ([TRAIN, "--init_from=hf", "--out_dir=new"],),
    f"{STEP}/manifest.json": ([TRAIN, f"--resume={STEP}", "--out_dir=new"],),
    "free/.lock": ([TRAIN, *flags(**SHORT), "--out_dir=free"],),
    "ds.json": ([TRAIN, "--engine=deepspeed", "--ds_config=ds.json", "--out_dir=new"],),
    "seeds/repeat.json": (["nanogpt", "repeat", "--out_dir=seeds"],),
}
SAFETENSORS_REFUSES = {"out/model.safetensors", "hf/model.safetensors", "free/.lock"}  # or nobody reads what it holds


@pytest.mark.parametrize("damage", [pipe, endless, deep, half_deep])
def test_what_is_no_file_of_ours_is_refused_at_once(finished, tmp_path, forked, damage):
    """Invariant: a pipe, a file without an end, JSON without a floor is one line and status 2, and nothing is made."""
    for name, readers in READERS.items():
        if name in SAFETENSORS_REFUSES and damage is not pipe:
            continue
        room = tmp_path / name.replace("/", "-")
        shutil.copytree(finished[0], room / "out", copy_function=os.link)  # a copy is written to a new file
        for directory in ("hf", "free", "seeds", STEP):
            (room / directory).mkdir(exist_ok=True, parents=True)
        os.link(finished[0] / "model.safetensors", room / "hf" / "model.safetensors")
        (room / name).unlink(missing_ok=True)
        damage(room / name)
        for words in readers:
            done = forked(room, *words)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), (name, words, done)
            assert not (room / "new").exists()


def test_commands_refuse_such_paths(tmp_path, finished, forked):
    """Invariant: the same for what a command writes, and where only the command looks."""
    for path in ("x" * 300, "a/" * 3000, "~nobody-of-that-name", "~nobody-of-that-name/x"):
        for words in (
            ["score", finished[0], f"--html={path}/page.html"],
            ["plot", finished[0], f"--out={path}.png"],
            ["export", finished[0], path],
            ["checkpoint", "verify", path],
            ["repeat", f"--out_dir={path}"],
        ):
            done = forked(tmp_path, "nanogpt", *words)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), (words, done)
    assert list(tmp_path.iterdir()) == []


REFUSING = """
#include <errno.h>
#include <sys/types.h>
int chmod(const char *path, mode_t mode) { errno = EPERM; return -1; }
int fchmod(int file, mode_t mode) { errno = EPERM; return -1; }
int flock(int file, int operation) { errno = ENOLCK; return -1; }
"""


@pytest.fixture
def refusing(tmp_path_factory):
    """The environment of a program whose file system has neither modes nor locks."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is needed to make a library that refuses chmod and flock")
    directory = tmp_path_factory.mktemp("refusing")
    (directory / "refusing.c").write_text(REFUSING)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "refusing.so", "refusing.c"], cwd=directory, check=True)
    return {"LD_PRELOAD": str(directory / "refusing.so"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_file_system_without_modes_and_locks(refusing, tmp_path):
    """Invariant: a run saves, ends and is exported; one line says that nothing is locked, and the fence is raised."""
    words = [*flags(**SHORT, max_steps=2, out_dir="out")]
    done = run(sys.executable, TRAIN, *words, cwd=tmp_path, env=refusing | {"SLURM_JOB_ID": "7"})
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout.count("has no locks") == 1
    assert "could not be saved" not in done.stdout
    assert (tmp_path / "out" / ".attempt").read_text() == "7.0"
    assert newest_intact(tmp_path / "out")[0].step == 2
    assert report(tmp_path / "out")["steps"] == 2
    assert load_run(str(tmp_path / "out")).model
    done = run(sys.executable, "-m", "nanogpt", "export", "out", "hf", cwd=tmp_path, env=refusing)
    assert done.returncode == 0, done.stderr
