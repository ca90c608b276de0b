"""The files of a run: strict JSON, whole or not at all, and never somebody else's."""

import errno
import fcntl
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from harness.rows import ROW
from harness.runs import SHORT, TRAIN, flags, report, run
from nanogpt.config.errors import ConfigError
from nanogpt.config.files import LARGEST_BYTES, user_path, whole
from nanogpt.config.train_config import TrainConfig
from nanogpt.data.corpus import cache_dir, read_corpus
from nanogpt.monitor.loggers import JsonlLogger, describe
from nanogpt.plots.run_history import read_curve
from nanogpt.storage.checkpoint import newest_intact
from nanogpt.storage.json_file import finite, write_json
from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.resume import find_start
from nanogpt.storage.run_dir import check_free, check_writable, load_run, write_config
from nanogpt.storage.run_lock import Attempt, hold_run_dir
from nanogpt.storage.tensor_file import save_tensors
from nanogpt.utils.format import duration

NO_JOB = Attempt("", 0)


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


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Invariant: content that is not JSON raises and changes nothing."""
    write_json(tmp_path / "report.json", {"loss": 1.0})
    with pytest.raises(TypeError):
        write_json(tmp_path / "report.json", {"loss": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"loss": 1.0}


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
    slow = (
        "with whole(Path(sys.argv[1])) as file:\n    file.write(b'half')\n    print(flush=True)\n    sys.stdin.read()"
    )
    program = f"import sys\nfrom pathlib import Path\nfrom nanogpt.config.files import whole\n{slow}"
    words = [sys.executable, "-c", program, str(path)]
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
    "~nobody-of-that-name": "is nobody's home here",
    "~nobody-of-that-name/x": "is nobody's home here",
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


def test_commands_refuse_such_paths(tmp_path, finished, forked):
    """Invariant: the same for what a command writes, and where only the command looks."""
    for path in [*PATHS][:4]:
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


def test_nobody_s_home_is_no_directory_here(tmp_path, monkeypatch):
    """Invariant: without HOME and a line in passwd ~ is refused; no directory gets that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(user_path("~/x", "it")) == "/home/me/x"
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for ask in (lambda: check_writable("~/x"), cache_dir, lambda: read_corpus("tinyshakespeare")):
        with pytest.raises(ConfigError, match="~ is nobody's home"):
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


def test_a_file_system_without_modes_and_locks(refusing, tmp_path):
    """Invariant: a run saves, ends and is exported; one line says that nothing is locked, and the fence is raised."""
    words = [*flags(**SHORT, max_steps=2, out_dir="out")]
    done = run(sys.executable, TRAIN, *words, cwd=tmp_path, env=refusing | {"SLURM_JOB_ID": "7"})
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout.count("has no locks") == 1
    assert "could be saved" not in done.stdout
    assert (tmp_path / "out" / ".attempt").read_text() == "7.0"
    assert newest_intact(tmp_path / "out")[0].step == 2
    assert report(tmp_path / "out")["steps"] == 2
    assert load_run(str(tmp_path / "out")).model
    done = run(sys.executable, "-m", "nanogpt", "export", "out", "hf", cwd=tmp_path, env=refusing)
    assert done.returncode == 0, done.stderr
