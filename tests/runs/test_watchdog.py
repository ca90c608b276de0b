"""A run that no longer moves ends, and says which rank stopped, and where. Real ranks, really stopped."""

import pickle
import re
import signal
import time

import pytest

from harness.forks import ForkedProgram
from harness.runs import TINY, TRAIN, WORKERS, flags, free_port, metrics, report, torchrun, wait_for

OPTIONS = TINY | {"dtype": "fp32", "log_every": 1, "out_dir": "out", "comm_timeout_s": 10, "target_loss": 1e-6}
HANGS = WORKERS / "hang_worker.py"


def start_ranks(cwd, script=TRAIN, **env):
    """Two ranks of a run that never ends, started by hand, each with its log."""
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = (script, *flags(**OPTIONS))
    return [ForkedProgram(1, cwd, cwd / f"log{rank}", *words, RANK=rank, LOCAL_RANK=rank, **env) for rank in "01"]


@pytest.fixture
def two_ranks(tmp_path):
    """start_ranks(), once they train; killed at the end."""
    ranks = start_ranks(tmp_path)
    wait_for(lambda: (tmp_path / "out" / "metrics.jsonl").exists() and metrics(tmp_path / "out"), seconds=120)
    yield ranks
    for process in ranks:
        process.kill()


@pytest.mark.slow
def test_a_rank_that_dies_while_all_connect(tmp_path):
    """Invariant: torch waits for it for eleven minutes; the other rank ends within the time-out and some seconds."""
    first, killed = start_ranks(tmp_path, HANGS, ASLEEP_IN="connecting")
    assert killed.wait(timeout=120) == -signal.SIGKILL
    assert first.wait(timeout=60) == 1
    (line,) = [line for line in (tmp_path / "log0").read_text().splitlines() if line.startswith("error: ")]
    assert "rank 1 does not answer" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_does_not_answer_is_named(two_ranks, tmp_path, stopped):
    """Invariant: the other rank ends within the time-out and some seconds, with the name and the step in one line."""
    two_ranks[stopped].send_signal(signal.SIGSTOP)
    assert two_ranks[1 - stopped].wait(timeout=60) == 1
    told = (tmp_path / f"log{1 - stopped}").read_text()
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert re.search(rf"rank {1 - stopped} at step \d+, ", line), line
    blamed = "rank 1 does not answer" if stopped else "lost the store that rank 0 or its launcher holds"
    assert blamed in line


def test_a_rank_that_hangs_in_python_is_named(tmp_path):
    """Invariant: its thread still answers, so the places tell who is behind; under torchrun, which ends the rest.

    torch's flight recorder, of gloo's collectives here, is written by both ranks, and tells the same.
    """
    recorder = {"TORCH_FR_BUFFER_SIZE": "100", "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "collectives_")}
    done = torchrun(2, *flags(**OPTIONS), cwd=tmp_path, script=HANGS, env={"ASLEEP_IN": "batch"} | recorder)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "rank 1 is behind, at step 8, batch (hang_worker.py:" in line
    assert "--comm_timeout_s" in line
    newest = [pickle.loads((tmp_path / f"collectives_{rank}").read_bytes())["entries"][-1] for rank in (0, 1)]
    assert newest[0]["collective_seq_id"] > newest[1]["collective_seq_id"]


@pytest.mark.slow
def test_scores_may_take_longer_than_a_step(tmp_path):
    """Invariant: a rank whose scores take longer than --comm_timeout_s ends no run that has reached its target."""
    options = OPTIONS | {"target_loss": 10}  # a few steps
    done = torchrun(2, *flags(**options), cwd=tmp_path, script=HANGS, env={"ASLEEP_IN": "scores"})
    assert done.returncode == 0, done.stderr
    assert report(tmp_path / "out")["scores_s"] > 21 > 2 * OPTIONS["comm_timeout_s"]


@pytest.mark.slow
def test_a_sleeping_machine_is_no_hang(two_ranks, tmp_path):
    """Invariant: when every rank was stopped for longer than the time-out, the run goes on."""
    for process in two_ranks:
        process.send_signal(signal.SIGSTOP)
    time.sleep(12)
    before = len(metrics(tmp_path / "out"))
    for process in two_ranks:
        process.send_signal(signal.SIGCONT)
    time.sleep(5)
    assert [process.poll() for process in two_ranks] == [None, None], (tmp_path / "log1").read_text()
    assert len(metrics(tmp_path / "out")) > before
