"""Many seeds: real runs, what is dropped, what a failure does, and going on."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from statistics import fmean

import pytest

from harness.runs import environment, flags, run, wait_for

# Some 60 steps; a loss of 0.5 does for a run that only has to end.
QUICK = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "subset_tokens": 40, "context_length": 8, "block_size": 8, "batch_size": 8,
    "learning_rate": 1e-2, "target_loss": 0.5, "dtype": "fp32", "max_steps": 200,
}  # fmt: skip


def repeat(*words, cwd):
    return run(sys.executable, "-m", "nanogpt", "repeat", *words, cwd=cwd, env={"HOME": str(cwd)})


@pytest.mark.slow
def test_seeds_are_run_once(tmp_path):
    """Invariant: one JSON and one table of runs that reached the target; again, more seeds: only the new one runs."""
    words = flags(**QUICK)
    first = repeat("--seeds=1", "--seed=3", *words, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    directory = tmp_path / "runs" / "repeat"
    written = (directory / "seed_3" / "report.json").stat().st_mtime_ns
    both = repeat("--seeds=2", "--seed=3", *words, cwd=tmp_path)
    assert both.returncode == 0, both.stdout + both.stderr
    assert (directory / "seed_3" / "report.json").stat().st_mtime_ns == written
    result = json.loads((directory / "repeat.json").read_text())
    steps = [json.loads((directory / f"seed_{seed}" / "report.json").read_text())["steps"] for seed in (3, 4)]
    assert [(run["seed"], run["steps"], run["reached"]) for run in result["runs"]] == [
        (3, steps[0], True), (4, steps[1], True),
    ]  # fmt: skip
    assert (result["reached"], result["failed"], result["steps"]["mean"]) == (2, 0, fmean(steps))
    assert (directory / "repeat.md").read_text() in both.stdout
    assert "| 4 | target reached |" in both.stdout
    other = repeat("--seeds=2", *flags(**QUICK | {"learning_rate": 2e-2}), cwd=tmp_path)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "with another --learning_rate" in other.stderr


def test_a_run_that_fails_is_counted(tmp_path):
    """Invariant: exit status 3, the failure in the JSON and the table, no mean."""
    done = repeat("--seeds=1", *flags(**QUICK | {"max_steps": 2}), "--out_dir=~/few", cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    result = json.loads((tmp_path / "few" / "repeat.json").read_text())
    assert (result["failed"], result["runs"][0]["exit_reason"], result["steps"]["mean"]) == (1, "max_steps", None)
    assert "1 did not reach the target" in done.stdout


def test_what_cannot_be_done_is_refused(tmp_path, forked):
    """Invariant: one line, exit status 2, nothing left behind; also where only the run itself can know."""
    for words, said in (
        (["--seeds=0"], "--seeds=0 must be a positive"),
        (["--resume=never"], "--resume=never"),
        (["--data=missing.txt"], "--data=missing.txt: no such file"),
    ):
        done = forked(tmp_path, "nanogpt", "repeat", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(f"error: {said}")
    done = run(sys.executable, "-m", "nanogpt", "repeat", cwd=tmp_path, env={"WORLD_SIZE": "2"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert list(tmp_path.glob("runs/*")) == []


@contextmanager
def repeating(cwd):
    """A repeat in the midst of its first run, which would not end: its process, killed at the end, and its words."""
    words = ["--seeds=1", *flags(**QUICK | {"target_loss": 1e-6, "max_steps": 100_000})]
    command = [sys.executable, "-m", "nanogpt", "repeat", *words]
    with subprocess.Popen(command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        directory = cwd / "runs/repeat/seed_0"
        rows = directory / "metrics.jsonl"
        try:
            wait_for(lambda: rows.exists() and rows.stat().st_size, process, seconds=120)
            yield process, words
        finally:
            process.kill()
            if directory.exists():
                (directory / "STOP").touch()  # to the run, which outlives a killed repeat


@pytest.mark.slow
def test_a_signal_stops_the_run_and_the_rest(tmp_path):
    """Invariant: status 4 after the run has left, nothing counted; the same command goes on."""
    with repeating(tmp_path) as (process, _):
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 4, said
    assert "the same command goes on" in said
    assert json.loads((tmp_path / "runs/repeat/seed_0/report.json").read_text())["exit_reason"] == "stopped"
    assert json.loads((tmp_path / "runs/repeat/repeat.json").read_text())["runs"] == []


@pytest.mark.slow
def test_a_run_that_is_ended_before_it_trains_is_no_failure(tmp_path):
    """Invariant: TERM to the run alone while it imports torch is a request to stop: status 4, nothing counted."""
    words = ["--seeds=1", *flags(**QUICK)]
    command = [sys.executable, "-m", "nanogpt", "repeat", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        wait_for((tmp_path / "runs/repeat/seed_0/output.txt").exists, process)
        wait_for(lambda: subprocess.run(["pkill", "-TERM", "-P", str(process.pid)]).returncode == 0, process)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 4, said
    assert json.loads((tmp_path / "runs/repeat/repeat.json").read_text())["runs"] == []


@pytest.mark.slow
def test_a_run_that_was_left_behind_is_no_failure(tmp_path):
    """Invariant: while the run of a killed repeat goes on, another is refused in one line, and counts nothing."""
    with repeating(tmp_path) as (process, words):
        process.kill()
        again = repeat(*words, cwd=tmp_path)
    directory = tmp_path / "runs/repeat/seed_0"
    assert (again.returncode, again.stderr.count("\n")) == (2, 1), again.stderr
    assert "is being written" in again.stderr
    assert json.loads((tmp_path / "runs/repeat/repeat.json").read_text())["runs"] == []
    wait_for((directory / "report.json").exists, seconds=60)  # the run went on, and left at our word
