"""A profile holds the steps that were asked for, of every rank, and changes nothing else."""

import gzip
import json
import subprocess
import sys

import pytest

from harness.forks import forked_ranks, train
from harness.runs import SHORT, TRAIN, environment, flags, metrics, report, wait_for

OPTIONS = SHORT | {"dtype": "fp32", "log_every": 1, "out_dir": "out"}
PHASES = {"batch", "forward and backward", "update", "weight average"}


def phases(trace):
    """How often a trace has each of the loop's phases."""
    with gzip.open(trace, "rt") as file:
        names = [e["name"] for e in json.load(file)["traceEvents"] if e.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in PHASES}


def curve(cwd):
    """What a run says of its training, but for clocks and memory."""
    return [(row["step"], row["loss"], row["grad_norm"], row["full_pass_loss"]) for row in metrics(cwd / "out")]


@pytest.mark.slow
def test_each_rank_has_a_trace_and_the_curve_is_the_same(tmp_path):
    """Reference: the same two ranks without a profile, bit for bit; each phase is there once in each of 3 steps."""
    for name, options in (("with", {"profile_steps": "4:7"}), ("without", {})):
        (tmp_path / name).mkdir()
        done = forked_ranks(2, tmp_path / name, TRAIN, *flags(**OPTIONS, max_steps=8, **options))
        assert "after 8 steps" in done.stdout, done.stderr
        if options:
            profiled = done
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    weights = [(tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]

    profile = tmp_path / "with" / "out" / "profile"
    assert sorted(path.name for path in profile.iterdir()) == [
        "rank_00000.json.gz", "rank_00001.json.gz", "summary.txt",
    ]  # fmt: skip
    for rank in (0, 1):
        assert phases(profile / f"rank_{rank:05d}.json.gz") == dict.fromkeys(PHASES, 3)
    summary = (profile / "summary.txt").read_text()
    assert summary in profiled.stdout
    assert "profile of steps 4 to 6 on rank 0" in summary
    assert "aten::mm" in summary
    assert len(summary.splitlines()) <= 15
    assert max(map(len, summary.splitlines())) <= 100
    shares = [float(line.split("%")[0]) for line in summary.splitlines()[3:]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares)), "each is rounded to 0.1"
    assert "profiler_start" not in profiled.stderr, "what the library says of itself"


def test_a_range_that_the_run_does_not_finish(tmp_path):
    """Invariant: a run that ends within the range has the steps until then; one that trains none of them says so."""
    done = train(*flags(**OPTIONS, max_steps=3, profile_steps="2:9"), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "profile of steps 2 to 3" in done.stdout
    trace = tmp_path / "out" / "profile" / "rank_00000.json.gz"
    assert phases(trace) == dict.fromkeys(PHASES, 2)

    before = trace.read_bytes()
    done = train(*flags(**OPTIONS, max_steps=5, profile_steps="2:4"), cwd=tmp_path)  # it goes on with step 4
    assert done.returncode == 3, done.stderr
    assert "warning: no step of --profile_steps=2:4 was trained: there is no profile" in done.stdout.splitlines()
    assert trace.read_bytes() == before
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_run_that_is_stopped_within_the_range(tmp_path):
    """Invariant: asked to stop, a run saves, then writes the profile of the steps that it has trained."""
    profiling = tmp_path / "out" / "checkpoints"  # a step has ended, and with it one of the profile
    program = subprocess.Popen(
        [sys.executable, TRAIN, *flags(**OPTIONS, profile_steps="1:100000", target_loss=1e-6, checkpoint_every=1)],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(profiling.exists, program)
    assert program.poll() is None
    program.terminate()
    said, _ = program.communicate(timeout=200)
    assert program.returncode == 4, said
    steps = report(tmp_path / "out")["steps"]
    assert said.index("saved; the same command goes on") < said.index(f"profile of steps 1 to {steps} on rank 0")
    assert phases(tmp_path / "out" / "profile" / "rank_00000.json.gz")["update"] == steps


def test_a_profile_that_cannot_be_written(tmp_path):
    """Invariant: one line says so, and the run goes on to its end."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "profile").write_text("a file where the directory should be")
    done = train(*flags(**OPTIONS, max_steps=3, profile_steps="1:2"), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("warning: the profile of rank 0 could not be written (FileExistsError") == 1
    assert len(metrics(tmp_path / "out")) == 3
