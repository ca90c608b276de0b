"""Paths that cannot be are refused in one line; files are written whole or not at all."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from harness.runs import REPOSITORY, SHORT
from nanogpt.config.errors import ConfigError
from nanogpt.config.files import user_path, whole
from nanogpt.config.train_config import TrainConfig
from nanogpt.data.corpus import cache_dir, read_corpus
from nanogpt.plots.run_history import read_curve
from nanogpt.storage.json_file import write_json
from nanogpt.storage.resume import find_start
from nanogpt.storage.run_dir import check_writable, load_run


@contextmanager
def ordinary_user():
    """Within it root is one, where the file system asks."""
    is_root = os.geteuid() == 0
    try:
        os.seteuid(65534 if is_root else os.geteuid())
        yield
    finally:
        os.seteuid(0 if is_root else os.geteuid())


PATHS = {
    "x" * 300: "File name too long",
    "a/" * 3000: "File name too long",
    "~nobody-of-that-name": "is no user's home directory here",
    "~nobody-of-that-name/x": "is no user's home directory here",
    "closed/out": "Permission denied",
    "loop": "Too many levels of symbolic links",
}


@pytest.mark.parametrize("path", PATHS, ids=[path[:30] for path in PATHS])
def test_a_path_that_cannot_be_is_refused(monkeypatch, path):
    """Invariant: one ConfigError of one line that says why, whatever is asked of it."""
    options = {"max_steps": 1} | SHORT
    with tempfile.TemporaryDirectory() as name, monkeypatch.context() as inside:  # pytest's own are closed to others
        room = Path(name)
        room.chmod(0o777)
        inside.chdir(room)
        (room / "closed" / "out").mkdir(parents=True)
        (room / "loop").symlink_to("loop")
        (room / "closed").chmod(0)
        with ordinary_user() if path.startswith("closed") else nullcontext():
            _refuse(path, options)
        (room / "closed").chmod(0o700)


def _refuse(path, options):
    for ask in (
        lambda: check_writable(path),
        lambda: find_start(TrainConfig(**options, resume=path), ""),
        lambda: load_run(path),
        lambda: read_curve(path),
        lambda: read_corpus(path),
    ):
        with pytest.raises(ConfigError) as refused:
            ask()
        assert PATHS[path] in str(refused.value)
        assert "\n" not in str(refused.value)


def test_nobody_s_home_is_no_directory_here(tmp_path, monkeypatch):
    """Invariant: without HOME and a line in passwd ~ is refused; no directory gets that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(user_path("~/x", "it")) == "/home/me/x"
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for ask in (lambda: check_writable("~/x"), cache_dir, lambda: read_corpus("tinyshakespeare")):
        with pytest.raises(ConfigError, match="~ is no user's home"):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_a_working_directory_that_no_file_can_name(tmp_path, monkeypatch):
    """Invariant: where it is not UTF-8 or gone a run is refused at its start; a command still reads there."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(ConfigError, match="which is not UTF-8: start in another directory"):
        check_writable("out")
    assert check_writable(str(tmp_path)) == tmp_path
    assert user_path("out", "out").parts == ("out",)
    odd.rmdir()
    with pytest.raises(ConfigError, match="the working directory is gone"):
        check_writable("out")


SLOW_WRITER = """
import sys
from pathlib import Path
from nanogpt.config.files import whole

with whole(Path(sys.argv[1])) as file:
    file.write(b"half")
    print(flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    """Invariant: the file of a writer that lives stays; once it is killed that alone is removed."""
    path, names = tmp_path / "a[1].json", lambda: sorted(path.name for path in tmp_path.iterdir())
    path.with_name(".a[1].json.tmp").write_text("somebody's")
    words = [sys.executable, "-c", SLOW_WRITER, str(path)]
    with subprocess.Popen(words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        write_json(path, {"loss": 1.0})
        assert (len(names()), names()[-1]) == (3, "a[1].json")
        writer.kill()
    assert len(names()) == 3
    write_json(path, {"loss": 2.0})
    assert names() == [".a[1].json.tmp", "a[1].json"]
    assert json.loads(path.read_text()) == {"loss": 2.0}


def _no_locks(*_):
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.mark.parametrize("has_locks", [True, False])
def test_writers_at_once_do_each_other_no_harm(tmp_path, monkeypatch, has_locks):
    """Invariant: what stands there is one writer's, whole, at any time; with locks and without."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", _no_locks)
    path, block = tmp_path / "file", 100_000
    path.write_bytes(b"0" * block)

    def write(digit):
        for _ in range(50):
            with whole(path) as file:
                file.write(digit * (block // 2))
                file.write(digit * (block // 2))
            found = path.read_bytes()
            assert (len(found), len(set(found))) == (block, 1)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, [b"1", b"2", b"3", b"4"]))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_without_locks_a_leftover_is_told_by_its_age(tmp_path, monkeypatch):
    """Invariant: of two files of writers unknown the one from yesterday is removed."""
    monkeypatch.setattr("nanogpt.config.files.lock", lambda file, patience_s: False)
    for name, age_s in ((".file.00000000.tmp", 86_400), (".file.11111111.tmp", 10)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    with whole(tmp_path / "file") as file:
        file.write(b"all")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.11111111.tmp", "file"]
