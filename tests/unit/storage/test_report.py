"""report.json and config.json: what is written is what is read, and what another version wrote is known or refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from harness.runs import TRAIN, report
from nanogpt.config.errors import ConfigError
from nanogpt.storage.json_file import FORMAT_VERSION
from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.report import Report, ScoresPrecision, exit_reason

# Of a report as the first version with one wrote it.
FIRST = """
reached exit_reason target_loss loss floor steps bad_steps tokens launch_s train_s device_s full_pass_s compile_s engine
world_size device dtype compiled final_learning_rate corpus_sha256 subset_tokens
"""


@pytest.fixture
def copy(finished, tmp_path):
    """The tiny run's directory without its checkpoints, which may be changed."""
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def test_what_is_read_is_what_was_written(finished):
    """Reference: both files of a real run, key by key, in their order, each number of its own type."""
    for cls, name in ((Report, "report.json"), (RunInfo, "config.json")):
        text = (finished[0] / name).read_text()
        assert json.dumps(cls.read(finished[0] / name, of="a run").to_json(), indent=2) + "\n" == text
        assert next(iter(json.loads(text).items())) == ("format_version", FORMAT_VERSION)


def test_keys_that_depend_on_the_end(finished):
    """Invariant: without scores, weights and what MFU is computed with there are no keys of them."""
    whole = Report.read(finished[0] / "report.json", of="a run")
    stopped = replace(whole, mfu=None, scores=None, scores_s=None, weights_sha256=None).to_json()
    lost = [name for name in whole.to_json() if name not in stopped]
    assert lost == [
        "flops_per_token", "peak_flops_per_s", "full_pass", "strided_loss", "random_offset_loss", "reference_loss",
        "memorised_bits", "bits_per_parameter", "recall", "control", "scores_s", "weights_sha256",
    ]  # fmt: skip
    assert replace(whole, scores=replace(whole.scores, control=None)).to_json()["control"] is None
    with pytest.raises(ValueError, match="the run ended with target_reached: it has no scores"):
        _ = replace(whole, scores=None).recall


def test_a_precision_is_its_name_in_json(finished):
    """Reference: the strings that scores_precision has always had."""
    whole = Report.read(finished[0] / "report.json", of="a run")
    names = {"fp32": "fp32", "bf16": "bf16", "bf16 weights": "bf16"}
    assert {each.value: each.dtype for each in ScoresPrecision} == names
    for each in ScoresPrecision:
        assert replace(whole, scores_precision=each).to_json()["scores_precision"] == str(each) == f"{each}"


def test_a_newer_version_is_refused(copy, forked):
    """Invariant: one line and status 2 from whatever reads the file, and the run is not begun again."""
    everyone = [["nanogpt", name, "run"] for name in ("score", "verify", "recite", "sample", "plot")]
    train = [TRAIN, "--out_dir=run", "--subset_tokens=40", "--context_length=32"]
    for name in ("config.json", "report.json"):
        kept = (copy / name).read_text()
        (copy / name).write_text(json.dumps(json.loads(kept) | {"format_version": FORMAT_VERSION + 1}))
        for words in [*everyone, train]:
            done = forked(copy.parent, *words)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), (words, done)
            assert f"{name} has format_version {FORMAT_VERSION + 1}, {FORMAT_VERSION} is the newest" in done.stderr
        (copy / name).write_text(kept)


def test_the_first_version_is_read(copy, forked):
    """Invariant: files without a version and without the keys that came later are read, and recited from."""
    told, stored = report(copy), json.loads((copy / "config.json").read_text())
    old = {name: told[name] for name in FIRST.split()}
    (copy / "report.json").write_text(json.dumps(old | {"recall": {"exact_recall": 1.0}}))
    (copy / "config.json").write_text(json.dumps({name: stored[name] for name in ("config", "floor", "versions")}))
    found = Report.read(copy / "report.json", of="a run")
    assert (found.format_version, found.loss, found.seed, found.scores) == (1, told["loss"], None, None)
    assert found.unread_scores == "it has no full_pass"
    done = forked(copy.parent, "nanogpt", "recite", "run", "--max_tokens=4")
    assert done.returncode == 0, done.stderr
    for command in ("score", "verify"):
        done = forked(copy.parent, "nanogpt", command, "run")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "was scored by another version, or edited: it has no full_pass" in done.stderr


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"steps": "3"}, "steps is '3', not a whole number"),
        ({"steps": True}, "steps is True, not a whole number"),
        ({"loss": []}, r"loss is \[\], not a number"),
        ({"reached": 1}, "reached is 1, not true or false"),
        ({"peak_memory_bytes": 1}, "peak_memory_bytes is 1, not a list"),
        ({"versions": {"torch": 2}}, "versions.torch is 2, not text"),
        ({"scores_precision": "fp8"}, "scores_precision is 'fp8', not one of fp32, bf16, bf16 weights"),
        ({"format_version": "1"}, "format_version is '1', not a whole number"),
        ({"exit_reason": None}, "exit_reason is None, not text"),
    ],
)
def test_an_edited_report_is_one_line(copy, edit, message):
    """Invariant: a value of another type is a ConfigError that names it, and what is wrong with it."""
    (copy / "report.json").write_text(json.dumps(report(copy) | edit))
    with pytest.raises(ConfigError, match=rf"report.json is not a run's: {message}$"):
        Report.read(copy / "report.json", of="a run")


def test_why_a_run_ended_asks_for_nothing_else(tmp_path):
    """Invariant: None without a report, the reason of one that holds nothing else, an error without a reason."""
    assert exit_reason(tmp_path / "report.json") is None
    (tmp_path / "report.json").write_text('{"exit_reason": "stopped"}')
    assert exit_reason(tmp_path / "report.json") == "stopped"
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"report.json is not a run's: it has no exit_reason"):
        exit_reason(tmp_path / "report.json")


def test_a_report_is_read_without_torch():
    """Invariant: a program that only reads the files does not wait for torch."""
    code = "import sys, nanogpt.storage.report; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
