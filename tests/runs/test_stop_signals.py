"""What a signal does, before there is anything to save, during a save and after a run; and a lost run directory.

Signals, launchers, permissions and removals are real.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from harness.lanes import slow
from harness.resuming import catches, has_trained, names, start
from harness.runs import SHORT, TRAIN, environment, flags, wait_for

HERE = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


@pytest.mark.parametrize("how", ["SIGTERM", slow("SIGINT"), slow("SIGHUP")])
def test_before_there_is_anything_to_save_it_ends_the_process(how, tmp_path):
    """Invariant: the signal's ordinary effect at once, without a word, and nothing left behind."""
    program = start(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    wait_for(lambda: catches(program, signal.SIGUSR1), program)  # torch, which takes seconds, is being imported now
    program.send_signal(getattr(signal, how))
    assert program.wait(timeout=5) == -getattr(signal, how)
    assert (names(tmp_path), (tmp_path / "log").read_text()) == ({"log"}, "")


@pytest.mark.slow
def test_a_compilation_can_be_ended(tmp_path, monkeypatch):
    """Invariant: TERM ends a process whose model is being compiled, which takes longer than torchrun's 30 s may be."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    program = start(tmp_path, compile="true")
    wait_for(lambda: list(tmp_path.glob("cache/**/*.cpp")), program)  # it is being compiled now
    program.terminate()
    assert program.wait(timeout=5) == -signal.SIGTERM
    assert not names(tmp_path / "out" / "checkpoints")
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_an_interrupt_ends_a_save_that_hangs(tmp_path):
    """Invariant: TERM begins a save, which waits in the kernel for a pipe's reader; Ctrl-C then ends the process."""
    (tmp_path / "start.py").write_text(
        "import os\nimport train_overfit\nfrom nanogpt.storage import checkpoint\n"
        "os.mkfifo('pipe')\ncheckpoint._sync = lambda path: open('pipe')\ntrain_overfit.main(train_overfit.run)\n"
    )
    program = start(tmp_path, program="start.py", max_steps=100_000, target_loss=0.01)
    wait_for(has_trained(tmp_path), program)
    program.terminate()
    wait_for(lambda: "SIGTERM at step" in (tmp_path / "log").read_text(), program)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(timeout=1)
    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=5) == -signal.SIGINT


NOTEBOOK = """
import os, signal, sys, threading, time
from nanogpt.config.train_config import TrainConfig
from nanogpt.config.errors import ConfigError
from nanogpt.training.run import train
from nanogpt.utils.signals import StopSignals

def handlers():
    return [signal.getsignal(getattr(signal, name)) for name in {here}]

def cell(**options):
    return train(TrainConfig(**({options} | options)), launched=time.perf_counter(), stop=StopSignals()).status

before = handlers()
assert before[1] is signal.default_int_handler
assert cell(max_steps=2, out_dir="ends") == 3
assert handlers() == before
try:
    cell(data="missing.txt", out_dir="refused")
except ConfigError:
    assert handlers() == before
else:
    sys.exit("not refused")

def interrupt():
    while not os.path.exists("stopped/metrics.jsonl") or not os.path.getsize("stopped/metrics.jsonl"):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
assert cell(max_steps=100_000, target_loss=1e-6, out_dir="stopped") == 4
assert handlers() == before
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""


@pytest.mark.slow
def test_a_notebook_gets_its_signals_back(tmp_path):
    """Reference: the handlers of before, after a run that ends, one that is refused and one that Ctrl-C stopped.

    After the last of them Ctrl-C is a KeyboardInterrupt again, and TERM ends the process.
    """
    options = SHORT | {"dtype": "fp32", "health": "off", "log_every": 1, "wandb": "disabled"}
    code = NOTEBOOK.format(here=HERE, options=options)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(OMP_NUM_THREADS="1"), capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == -signal.SIGTERM, done.stdout + done.stderr
    assert done.stdout.endswith("interrupted\n")
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_removed_directory_is_told(tmp_path):
    """Invariant: status 1, one line and no traceback; what a person has removed does not come back."""
    program = start(tmp_path)
    wait_for(has_trained(tmp_path), program)
    shutil.rmtree(tmp_path / "out")
    assert program.wait(timeout=200) == 1
    said = (tmp_path / "log").read_text().splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert "removed" in said[-1]
    assert names(tmp_path) == {"log"}


@pytest.fixture
def room():
    """An empty directory that another user reaches, unlike pytest's."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o777)
        yield Path(path)


@pytest.mark.slow
def test_a_directory_that_turns_unreadable_and_a_stop_that_stays(room):
    """Invariant: what cannot be looked at is not there; what cannot be removed or written is a line, and status 4."""
    ordinary = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    if ordinary and not shutil.which("setpriv"):
        pytest.skip("root needs setpriv to become an ordinary user")
    words = [*flags(**SHORT, max_steps=100_000, target_loss=1e-6, log_every=1, dtype="fp32", out_dir="out")]
    env = environment(OMP_NUM_THREADS="1", HOME=str(room))
    with (
        (room / "log").open("w") as log,
        subprocess.Popen(
            [*ordinary, sys.executable, TRAIN, *words], cwd=room, env=env, stdout=log, stderr=log
        ) as program,
    ):
        try:
            wait_for(has_trained(room), program)
            with (room / "out" / "metrics.jsonl").open() as rows:  # its owner cannot open it later
                (room / "out").chmod(0)
                for _ in range(3):
                    rows.read()
                    wait_for(lambda: rows.read(1), program)
            program.send_signal(signal.SIGSTOP)
            (room / "out").chmod(0o755)
            (room / "out" / "STOP").touch()
            (room / "out").chmod(0o555)
            program.send_signal(signal.SIGCONT)
            assert program.wait(timeout=200) == 4, (room / "log").read_text()
        finally:
            program.kill()
            (room / "out").chmod(0o755)
    said = (room / "log").read_text()
    assert "report.json cannot be written (Permission denied)" in said
    assert "STOP cannot be removed (Permission denied)" in said
    assert "Traceback" not in said
