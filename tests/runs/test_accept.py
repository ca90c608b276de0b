"""`nanogpt accept` as an engineer runs it: alone, on two ranks, with a rank that is wrong, and with one that dies."""

import json
import os
import shutil
import signal

import pytest

from harness.forks import ForkedProgram, forked, forked_ranks
from harness.runs import TINY, flags, wait_for

ACCEPT = ("nanogpt", "accept")
TRAINING = "--training=" + " ".join(flags(**TINY))


def report(tmp_path, name="acceptance"):
    return json.loads((tmp_path / name / "acceptance.json").read_text())


def failed(tmp_path):
    """{check: ranks that it blames} of all that failed."""
    stages = report(tmp_path)["checks"].values()
    return {check["name"]: check["ranks"] for stage in stages for check in stage if check["verdict"] == "FAIL"}


def verified(tmp_path, name="acceptance"):
    """What `accept --verify` says -> its status and its output."""
    done = forked(tmp_path, *ACCEPT, f"--verify={name}")
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The directory in which one process made an acceptance of the stages that train, and what that said."""
    tmp_path = tmp_path_factory.mktemp("alone")
    return tmp_path, forked(tmp_path, *ACCEPT, "--stages=numerics,faults,training", "--minutes=10", TRAINING)


@pytest.mark.slow
def test_one_process(alone):
    """Invariant: on a healthy machine each curve, fault and target passes, and the report is verified."""
    tmp_path, done = alone
    assert done.returncode == 0, done.stdout + done.stderr
    checks = report(tmp_path)["checks"]
    unknown = [c["name"] for s in ("numerics", "faults", "training") for c in checks[s] if c["verdict"] != "PASS"]
    assert unknown == ["SIGSTOP of a rank", "ranks while training"]  # of one rank
    assert checks["compute"][0]["found"] == "it was not asked for"
    assert "UNKNOWN: nothing failed" in done.stdout.splitlines()[-2]
    status, said = verified(tmp_path)
    assert (status, "verified: hashes, comparisons and verdicts follow" in said) == (0, True), said


@pytest.mark.slow
def test_a_changed_report_is_not_verified(alone, tmp_path):
    """Invariant: whoever changes a verdict, a run's figures or the page is found out, with status 1."""
    shutil.copytree(alone[0] / "acceptance", tmp_path / "acceptance")
    changes = {
        "acceptance.json": ('"verdict": "UNKNOWN"', '"verdict": "PASS"'),
        "acceptance.html": ("UNKNOWN", "PASS"),
        "faults/again/metrics.jsonl": ('"step": 3', '"step": 33'),
        "training/report.json": ('"steps": ', '"steps": 1'),
    }
    for file, (before, after) in changes.items():
        path = tmp_path / "acceptance" / file
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    status, said = verified(tmp_path)
    assert status == 1
    for line in (
        "acceptance.json: the verdict is PASS, the checks say UNKNOWN",
        "acceptance.html does not show acceptance.json",
        "faults/again/metrics.jsonl has changed: its SHA-256 differs",
        "faults/again: its losses are not what acceptance.json says of them",
        "training/report.json has changed: its SHA-256 differs",
        "training: its figures are not what acceptance.json says of them",
    ):
        assert f"DIFFERS {line}" in said, said


@pytest.mark.slow
def test_an_acceptance_is_not_overwritten(alone):
    """Invariant: the same command again is status 2 and one line, and the report stays."""
    tmp_path, _ = alone
    before = (tmp_path / "acceptance" / "acceptance.json").read_bytes()
    done = forked(tmp_path, *ACCEPT, "--minutes=1.5", TRAINING)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --out_dir={tmp_path}/acceptance is not empty: name another one\n",
    )
    assert (tmp_path / "acceptance" / "acceptance.json").read_bytes() == before


@pytest.mark.slow
def test_a_rank_that_computes_wrongly_is_named(tmp_path):
    """Invariant: of two ranks one loses its gradient in a step; alone and together that shows, and it is to blame."""
    words = ("--stages=numerics", "--minutes=10", "--inject=drop_gradient:rank=1,step=5")
    done = forked_ranks(2, tmp_path, *ACCEPT, *words, NANOGPT_ALLOW_FAULTS="1")
    assert done.returncode == 1, done.stdout
    blamed = failed(tmp_path)
    assert blamed["fp32, each rank alone"] == [1]
    assert {f"fp32, {engine}" for engine in ("ddp", "sharded", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")} <= blamed.keys()
    assert "the gradient norm of step 5 is" in done.stdout
    assert verified(tmp_path)[0] == 0


@pytest.mark.slow
def test_a_rank_that_dies_is_named(tmp_path):
    """Invariant: SIGKILL for the second rank: the first one writes a report that names it, and leaves with status 1."""
    program = ForkedProgram(2, tmp_path, tmp_path / "log", *ACCEPT, "--stages=compute", "--minutes=20")
    try:
        wait_for((tmp_path / "acceptance" / "acceptance.json").exists)  # the inventory's
        os.kill(program.pids[1], signal.SIGKILL)
        wait_for(lambda: "\nFAIL: " in (tmp_path / "log").read_text())
    finally:
        program.kill()
    assert failed(tmp_path) == {"ranks that answer": [1]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages=computing"], "--stages=computing: 'computing' is none of inventory, compute"),
        (["--minutes=0"], "--minutes=0.0 must be a positive number"),
        (["--expect=nowhere.json"], "--expect=nowhere.json: no such file"),
        (["--training=--out_dir=x"], "--training: --out_dir is the acceptance's own: leave it out"),
        (["--sign=nowhere"], "--sign=nowhere: no such file"),
        (["--verify=nowhere"], "nowhere/acceptance.json: no such file: is nowhere the directory of an acceptance?"),
        (["--inject=flip:rank=0,step=2"], "breaks the run on purpose: set NANOGPT_ALLOW_FAULTS=1"),
        (["--out_dir=/dev/null/x"], "--out_dir=/dev/null/x cannot be written: Not a directory"),
    ],
)
def test_a_mistake_is_one_line(words, said, tmp_path):
    """Invariant: status 2 and one line, and nothing is left behind."""
    done = forked(tmp_path, *ACCEPT, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
