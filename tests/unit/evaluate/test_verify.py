"""verify finds what a run states, and what somebody has changed since."""

import ast
import json
import re
import shutil
from collections import Counter
from itertools import islice

import pytest
from safetensors.torch import load_file, save_file

from harness.forks import forked
from harness.runs import REPOSITORY, report
from nanogpt.evaluate.verify import verify, verify_run
from nanogpt.storage.run_dir import load_run

TEXT = REPOSITORY / "nanogpt" / "assets" / "coriolanus.txt"


@pytest.fixture
def copy(finished, tmp_path):
    """The tiny run's directory, copied, and memorising a text that stands beside it."""
    (tmp_path / "run").mkdir()
    shutil.copy(TEXT, tmp_path / "text.txt")
    shutil.copy(finished[0] / "model.safetensors", tmp_path / "run")
    for name in ("config.json", "report.json"):
        content = json.loads((finished[0] / name).read_text())
        (content["config"] if name == "config.json" else content)["data"] = str(tmp_path / "text.txt")
        (tmp_path / "run" / name).write_text(json.dumps(content))
    return tmp_path / "run"


def differing(run_dir):
    """The names that verify finds to differ."""
    loaded = load_run(str(run_dir))
    return [c.name for c in verify_run(loaded, run_dir) if not c.fits]


def edit_report(run_dir, place, value):
    """Set the figure at place, as 'recall.exact_recall', in report.json."""
    content = report(run_dir)
    *path, last = place.split(".")
    inner = content
    for key in path:
        inner = inner[key]
    assert inner[last] != value
    inner[last] = value
    (run_dir / "report.json").write_text(json.dumps(content))


def test_a_run_is_verified(copy):
    """Invariant: a check for every figure of the report that is a score; status 0, and each counts as one that fits."""
    checks = verify(str(copy))
    scores = {name for name, _ in flat({k: report(copy)[k] for k in ("full_pass", "recall", "control")})}
    named = {"floor", "loss", "strided_loss", "random_offset_loss", "memorised_bits", "bits_per_parameter", "reached"}
    assert scores | named <= {check.name for check in checks}
    done = forked(copy, "nanogpt", "verify", copy)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    counts = Counter(check.group for check in checks)
    assert lines == [f"{group}: {count} of {count} fit" for group, count in counts.items()]
    assert list(counts) == ["text, weights and options", "losses and bits", "recall", "control text"]
    assert last.startswith("verified in fp32: ")


def flat(tree, prefix=""):
    for name, value in tree.items():
        yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def test_every_edited_figure_is_found(copy):
    """Invariant: figures of the report that are changed, a share by one item and a loss by a thousandth, are named."""
    told = report(copy)
    recall, control = told["recall"], told["control"]["recall"]
    edits = {
        "reached": False, "target_loss": 0.09, "seed": 1, "stride": 16, "weights_sha256": "0" * 64,
        "floor": told["floor"] * 0.999, "loss": told["loss"] - 1e-3, "strided_loss": told["strided_loss"] * 0.999,
        "full_pass.loss": told["full_pass"]["loss"] * 0.999, "memorised_bits": None,
        "recall.exact_recall": recall["exact_recall"] + 1 / recall["exact_recall_prompts"],
        "recall.hop_recitation.edit_distance": recall["hop_recitation"]["edit_distance"] + 0.05,
        "recall.verbatim_run.max_tokens": 999,
        "control.recall.log_p.median": control["log_p"]["median"] * 1.01,
    }  # fmt: skip
    for place, value in edits.items():
        edit_report(copy, place, value)
    done = forked(copy, "nanogpt", "verify", copy)
    assert done.returncode == 1
    assert done.stderr.startswith("NOT verified: ")
    assert set(done.stderr.removeprefix("NOT verified: ").strip().split(", ")) == set(edits)
    shown = re.findall(r"^DIFFERS (\S+): stated .+, found .+$", done.stdout, flags=re.MULTILINE)
    counts = re.findall(r"^\D+: (\d+) of (\d+) fit$", done.stdout, flags=re.MULTILINE)
    assert set(shown) == set(edits)
    assert sum(int(total) - int(fitting) for fitting, total in counts) == len(shown) == len(edits)
    assert len(done.stdout.splitlines()) == len(shown) + len(counts)


def test_a_looser_precision_cannot_be_claimed(copy):
    """Invariant: a report that states bf16 scores, to be allowed more, is found; so is another exit reason."""
    edit_report(copy, "scores_precision", "bf16")
    edit_report(copy, "exit_reason", "max_steps")
    loaded = load_run(str(copy))
    facts = islice(verify_run(loaded, copy), 14)  # before anything is computed
    assert [check.name for check in facts if not check.fits] == ["scores_precision", "exit_reason"]


def test_score_shows_what_the_report_states(copy, forked):
    """Invariant: the table holds the report's figures, and --line a prompt that stands before those words."""
    told = report(copy)
    score = (copy, "nanogpt", "score", copy)
    shown = forked(*score).stdout
    for figure in (told["full_pass"]["loss"], told["strided_loss"], told["control"]["strided_loss"]):
        assert f" {figure:.4f} " in shown
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in shown.splitlines() if line.startswith("│")]
    assert all(name for name, *_ in rows), "no name goes on in a second line"
    assert sum(not any(figures) for _, *figures in rows) == 6, "headings"
    assert ["loss, nats/token", f"{told['full_pass']['loss']:.4f}", ""] in rows
    assert f"{told['recall']['exact_recall']:.1%} of {told['recall']['exact_recall_prompts']}" in shown
    done = forked(*score, "--line=We know't, we know't.")
    count, prompt = re.fullmatch(r"shortest prompt that brings it back, (\d+) tokens?: (.*)\n", done.stdout).groups()
    assert 1 <= int(count) <= 32
    assert f"{ast.literal_eval(prompt)}We know't, we know't." in TEXT.read_text()
    older = {name: value for name, value in told.items() if name != "memorised_bits"}
    for words, content in ((["--line=Lo, a zebra"], told), (["--html=page.html"], told | {"recall": 1}), ([], older)):
        (copy / "report.json").write_text(json.dumps(content))
        done = forked(copy, "nanogpt", "score", copy, *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


@pytest.mark.slow
def test_edited_weights_are_found(copy):
    """Invariant: by the file's hash and by the scores, though the report has been given the new hash."""
    path = copy / "model.safetensors"
    weights = load_file(path)
    weights["transformer.h.1.mlp.c_fc.weight"][:32] *= 0.5
    save_file(weights, path, metadata={"format": "pt"})
    found = differing(copy)
    assert {"weights_sha256", "full_pass.loss", "strided_loss", "memorised_bits"} <= set(found)


@pytest.mark.slow
def test_an_edited_text_is_found(copy):
    """Invariant: one word changed within the memorised tokens is found by the text's hash and by the scores."""
    text = copy.parent / "text.txt"
    text.write_text(text.read_text().replace("rather to die", "rather to live", 1))
    assert {"corpus_sha256", "full_pass.loss", "strided_loss"} <= set(differing(copy))
    text.write_text("First Citizen:\n")
    assert {"corpus_sha256", "tokens of the text"} == set(differing(copy))


def test_what_is_missing_is_one_line(copy, forked):
    """Invariant: status 2 and one line without the text, the weights, the report or scores in it."""
    told = report(copy)
    del told["recall"]
    for damage in (
        (copy / "report.json").unlink,
        lambda: (copy / "report.json").write_text(json.dumps(told)),
        (copy.parent / "text.txt").unlink,
        (copy / "model.safetensors").unlink,
    ):
        kept = {path: path.read_bytes() for path in (*copy.iterdir(), copy.parent / "text.txt")}
        damage()
        done = forked(copy, "nanogpt", "verify", copy)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        for path, content in kept.items():
            path.write_bytes(content)
