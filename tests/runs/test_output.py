"""Standard output is never worth a run, and a command whose output is lost says so."""

import contextlib
import os
import pty
import resource
import select
import subprocess
import sys
import threading
import time

import pytest

from harness.runs import REPOSITORY, SHORT, TRAIN, WORKERS, environment, flags, metrics, report, run
from nanogpt.config.cli import printable
from nanogpt.utils.console import COMMAND, NEVER, Output, OutputLost

REDIRECTED = WORKERS / "redirected.py"
TEXT = "“Hélas”, là-bas … ☃ "
NO_SPACE = "error: the output cannot be written: No space left on device\n"
LINES = [b"line %d of the log\n" % i for i in range(10_000)]  # three times what a pipe holds


@contextlib.contextmanager
def file_size_limit(size):
    """RLIMIT_FSIZE, as `ulimit -f` sets it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("how", ["ulimit", "disk"])
def test_a_log_where_there_is_room_again(how, tmp_path, request):
    """Invariant: the log is whole, with the limit and the full disk in the middle of a line; a command says why."""
    place = tmp_path if how == "ulimit" else request.getfixturevalue("small_disk")
    filler, log = place / "filler", place / "log"
    if how == "disk":
        filler.write_bytes(bytes(48 * 1024))
    with log.open("wb", buffering=0) as file, file_size_limit(10_000) if how == "ulimit" else contextlib.nullcontext():
        output = Output(file.fileno(), NEVER)
        for line in LINES[:1500]:
            output.write(line)
        assert 8192 < log.stat().st_size < len(b"".join(LINES[:1500]))
        with pytest.raises(OutputLost, match=r"cannot be written: (File too large|No space left on device)"):
            Output(os.dup(file.fileno()), COMMAND).write(b"text")
        if how == "ulimit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        filler.unlink(missing_ok=True)
        output.write(LINES[1500])
    assert log.read_bytes() == b"".join(LINES[:1501])


def test_a_reader_that_leaves():
    """Invariant: raised once, in the main thread and on standard output, where more than the end of a line is lost."""
    reader, writer = os.pipe()
    os.close(reader)
    aside, output = Output(os.dup(writer), NEVER), Output(writer, COMMAND)
    assert aside.write(b"text") == 4
    assert output.write(b"\n") == 1
    thread = threading.Thread(target=lambda: written.append(output.write(b"from a thread\n")))
    written = []
    thread.start(), thread.join()
    assert written == [14]
    with pytest.raises(OutputLost, match=r"^nobody reads the output any more$"):
        output.write(b"text\n")
    assert output.write(b"text\n") == 5
    assert os.readlink(f"/proc/self/fd/{writer}") == os.devnull
    os.close(writer)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A run on a terminal of Latin-1, of a text and a file name that need more: its directory, what it showed."""
    place = tmp_path_factory.mktemp("narrow")
    (place / "naïve ☃.txt").write_text("".join(f"{TEXT}{i}\n" for i in range(100)), encoding="utf-8")
    words = flags(**SHORT, data="naïve ☃.txt", max_steps=3, log_every=1, out_dir="out")
    ours, theirs = pty.openpty()
    env = environment(TERM="xterm", PYTHONIOENCODING="latin-1", OMP_NUM_THREADS="1")
    std = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([sys.executable, TRAIN, *words], cwd=place, env=env, **std) as program:
        os.close(theirs)
        seen, give_up = b"", time.monotonic() + 120
        with contextlib.suppress(OSError):  # how Linux says that the other side has closed
            while select.select([ours], [], [], max(0.0, give_up - time.monotonic()))[0]:
                seen += os.read(ours, 4096)
        os.close(ours)
        assert program.wait(timeout=60) == 3, seen.decode("latin-1")
    return place / "out", seen.decode("latin-1")


def test_a_terminal_that_cannot_show_it(narrow):
    """Invariant: the run ends with its files, and on the screen is what Latin-1 has, a ? for the rest."""
    out_dir, screen = narrow
    assert "naïve ?.txt" in screen
    assert "?Hélas?, là-bas ? ?" in screen
    assert metrics(out_dir)[-1]["step"] == 3
    assert report(out_dir)["exit_reason"] == "max_steps"
    assert (out_dir / "recall.png").exists()


COMMANDS = {
    "recite": ("recite", "out", "--max_tokens=5"),
    "sample": ("sample", "out", "--max_tokens=5"),
    "score": ("score", "out"),
    "checkpoint": ("checkpoint", "verify", "out"),
    "plot": ("plot", "out", "--out=loss.svg"),
    "verify": ("verify", "out"),
    "help of one": ("repeat", "--help"),
    "help": ("--help",),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_where_nothing_can_be_shown(name, narrow, forked):
    """Invariant: to a full disk one line and status 1, to nowhere status 0, and every encoding prints all its lines."""
    place, words = narrow[0].parent, COMMANDS[name]
    usual = forked(place, "nanogpt", *words)
    assert usual.returncode == 0, usual.stderr
    full = forked(place, REDIRECTED, "full", *words)
    assert (full.returncode, full.stderr) == (1, NO_SPACE)
    closed = forked(place, REDIRECTED, "closed", *words)
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")
    ascii_ = forked(place, REDIRECTED, "ascii", *words)
    assert (ascii_.returncode, ascii_.stderr) == (0, usual.stderr)
    assert ascii_.stdout == usual.stdout.encode("ascii", errors="replace").decode()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["> /dev/full 2> /dev/full", ">&- 2>&- <&-"])
def test_a_run_that_nobody_hears(how, tmp_path):
    """Invariant: the run has its own status and its files, none of which holds what it would have printed."""
    words = " ".join(flags(**SHORT, max_steps=3, log_every=1, out_dir="out"))
    done = run("bash", "-c", f"{sys.executable} {TRAIN} {words} {how}", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    assert report(tmp_path / "out")["exit_reason"] == "max_steps"
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"parameters memorise" not in path.read_bytes(), path


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_end_finds_what_could_not_be_written(ranks):
    """Invariant: one line and status 1, not Python's 120, also of a rank that leaves without Python's end."""
    program = 'from nanogpt.config.cli import main; main(lambda: print("result") or 0)'
    done = run("bash", "-c", f"{sys.executable} -c '{program}' > /dev/full", cwd=REPOSITORY, env={"WORLD_SIZE": ranks})
    assert (done.returncode, done.stderr) == (1, NO_SPACE)


@pytest.mark.parametrize("words", [["train", "--help"], ["--help"]], ids=" ".join)
def test_a_command_whose_reader_leaves(words):
    """Invariant: as a program that SIGPIPE ends, it says nothing, and its status in a shell is 128 + 13."""
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "nanogpt", *words]
    done = subprocess.run(program, cwd=REPOSITORY, env=environment(), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_answer_is_no_error():
    """Invariant: a reader that leaves with all but the last line's end, as head and grep -q may, is no error."""
    program = """
import time
from nanogpt.config.cli import main
main(lambda: print("one\\ntwo", end="", flush=True) or time.sleep(1) or print() or 0)
"""
    command = f"{sys.executable} -c '{program}' | head -c 7; exit ${{PIPESTATUS[0]}}"
    done = run("bash", "-c", command, cwd=REPOSITORY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo", "")


def test_without_docstrings_there_is_help():
    """Invariant: python -OO, which takes them away, shows the same options and commands."""
    for words in ([str(TRAIN), "--help"], ["-m", "nanogpt", "--help"], ["-m", "nanogpt", "score", "--help"]):
        usual, bare = (run(sys.executable, *how, *words, cwd=REPOSITORY) for how in ((), ("-OO",)))
        assert (bare.returncode, bare.stderr) == (0, "")
        assert bare.stdout.strip()
        assert usual.stdout.endswith(bare.stdout)


def test_every_error_is_one_line(tmp_path, forked):
    """Invariant: whatever an argument holds, what it shows of it has no line end, and no escape for the terminal."""
    for words in (["--data=a\nb"], ["--data=\x1b[31mred\r\u2028\x85"], ["--resume=a\n\nb"]):
        done = forked(tmp_path, TRAIN, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.rstrip("\n").isprintable()
    done = forked(tmp_path, "nanogpt", "score", "no\nsuch")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no\\nsuch" in done.stderr
    assert printable("naïve ☃") == "naïve ☃"
