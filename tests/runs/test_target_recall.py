"""--target_recall: a run ends when so much of the text comes back, and what verify makes of a report that says so."""

import json
from itertools import pairwise

import pytest
import torch

from harness.forks import forked, forked_ranks, train
from harness.lanes import slow
from harness.runs import ALONE, TINY, TRAIN, flags, metrics, report
from nanogpt.data.dataset import memorised_dataset
from nanogpt.data.windows import Windows
from nanogpt.evaluate.recall import Forward, Reading, read
from nanogpt.evaluate.scorecard import window_recall
from nanogpt.evaluate.screening import screen, sure
from nanogpt.evaluate.verify import verify_run
from nanogpt.model.generate import second_half
from nanogpt.storage.run_dir import load_run

# Its loss is reached long before all of the text comes back.
OPTIONS = TINY | {"subset_tokens": 200, "batch_size": 8, "dtype": "fp32", "target_loss": 0.8, "max_steps": 600}
BY_HEART = OPTIONS | {"target_recall": 1}


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory):
    """A run that ended when it knew all by heart: its directory, and what was printed."""
    cwd = tmp_path_factory.mktemp("by_heart")
    done = train(*flags(**BY_HEART), cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "out", done.stdout


def test_it_ends_when_all_comes_back(by_heart):
    """Invariant: the last full pass is the first whose recall is 1, without a break in the recital; verify agrees."""
    out_dir, said = by_heart
    found, passes = report(out_dir), [row for row in metrics(out_dir) if row["full_pass_loss"] is not None]
    assert (found["reached"], found["target_recall"]) == (True, 1)
    assert (found["full_pass"]["exact_recall"], found["recall"]["recitation_breaks"]) == (1, 0)
    below = [row["full_pass_recall"] for row in passes if row["full_pass_loss"] <= 0.8]
    assert len(below) > 1, "the loss was there before the recall: else this test shows nothing"
    assert below[-1] == 1
    assert max(below[:-1]) < 1
    assert None not in [row["full_pass_recall"] for row in passes]
    assert "and all of it comes back" in said
    assert f"recall 100.0% of {found['full_pass']['windows']} windows (target 100.0%)" in said
    assert "[word for word as in the memorised text" in said
    assert "--target_recall=1" not in said
    assert forked(out_dir.parent, "nanogpt", "verify", "out").returncode == 0


def awaits_recall(row):
    """Whether a full pass found the loss there, and not the recall."""
    return row["full_pass_loss"] is not None and row["full_pass_loss"] <= 0.8 and row["full_pass_recall"] < 1


def test_the_eta_says_what_is_awaited(by_heart):
    """Invariant: up to the loss an ETA is of it, between loss and recall there is none, and at the end it is 0."""
    rows = metrics(by_heart[0])
    notes = [row["eta_note"] for row in rows]
    between = [i for i, row in enumerate(rows) if awaits_recall(row)]
    before = [note for note in notes[: between[0]] if "no ETA" not in note]
    assert before
    assert all("to the target loss" in note for note in before)
    assert set(notes[between[0] : -1]) == {"target loss reached, recall awaited"}
    assert (rows[-1]["eta_s"], notes[-1]) == (0, None)


@pytest.mark.slow
def test_looks_spare_full_passes(by_heart, tmp_path):
    """Reference: the same run whose looks rule nothing out: it makes more passes, and ends about as soon.

    What a pass of the one finds, the next look of the other does, which comes before another pass would.
    """
    (tmp_path / "start.py").write_text(
        "import train_overfit\n"
        "from nanogpt.training.evaluator import Evaluator\n"
        "Evaluator.rules_out_recall = lambda self, missed: 0.0\n"
        "train_overfit.main(train_overfit.run)\n"
    )
    done = forked(tmp_path, tmp_path / "start.py", *flags(**BY_HEART))
    assert done.returncode == 0, done.stdout
    ours, theirs = (
        [row["step"] for row in metrics(d) if row["full_pass_loss"] is not None]
        for d in (by_heart[0], tmp_path / "out")
    )
    assert len(ours) < len(theirs)
    assert ours[-1] - theirs[-1] < min(b - a for a, b in pairwise(theirs))


@pytest.mark.slow
def test_a_run_that_has_ended_goes_on(by_heart, tmp_path):
    """Reference: the curve of the run that was asked at once, whose passes come at other steps; then it has ended."""
    done = train(*flags(**OPTIONS), cwd=tmp_path)
    assert done.returncode == 0
    assert "the same command with --target_recall=1 goes on from here" in done.stdout
    first = report(tmp_path / "out")
    assert first["target_recall"] is None
    done = train(*flags(**BY_HEART), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resumed from step_{first['steps']:08d}" in done.stdout
    found = report(tmp_path / "out")
    assert (found["recall"]["recitation_breaks"], found["full_pass"]["exact_recall"]) == (0, 1)
    ours, theirs = ({row["step"]: row["grad_norm"] for row in metrics(d)} for d in (tmp_path / "out", by_heart[0]))
    common = ours.keys() & theirs.keys()
    assert max(common) > first["steps"]
    assert [ours[step] for step in common] == [theirs[step] for step in common]
    for options in (BY_HEART, OPTIONS, OPTIONS | {"target_recall": 0.5}):
        done = train(*flags(**options), cwd=tmp_path)
        assert (done.returncode, "nothing to do" in done.stdout) == (0, True)


@pytest.mark.slow
def test_a_spent_budget_is_not_reached(by_heart, tmp_path):
    """Invariant: with the loss and not the recall, status 3, and the last lines say how much came back."""
    row = next(row for row in metrics(by_heart[0]) if awaits_recall(row))
    done = train(*flags(**BY_HEART | {"max_steps": row["step"]}), cwd=tmp_path)
    assert done.returncode == 3
    found = report(tmp_path / "out")
    assert (found["reached"], found["exit_reason"]) == (False, "max_steps")
    assert found["loss"] <= 0.8
    assert "target NOT reached (max_steps): full-pass loss" in done.stdout
    assert "(target 100.0%)" in done.stdout
    assert forked(tmp_path, "nanogpt", "verify", "out").returncode == 0


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("target_recall", None, "target_recall"),
        ("target_recall", 0.5, "target_recall"),
        ("recall.recitation_breaks", 1, "reached"),
        ("full_pass.exact_recall", 0.99, "reached"),
        ("reached", False, "reached"),
        ("exit_reason", "max_steps", "exit_reason"),
    ],
)
def test_an_edited_report_is_found(by_heart, key, value, named):
    """Invariant: verify names what does not follow from the other figures."""
    path = by_heart[0] / "report.json"
    before = path.read_text()
    stated = json.loads(before)
    *outer, last = key.split(".")
    inner = stated
    for name in outer:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(stated))
    try:
        wrong = []
        for check in verify_run(load_run(str(by_heart[0])), by_heart[0]):
            wrong += [check.name] * (not check.fits)
            if check.name == "exit_reason":  # the scores are computed after it
                break
    finally:
        path.write_text(before)
    assert named in wrong


@pytest.mark.slow
def test_a_recall_that_the_weights_do_not_have_is_found(tmp_path):
    """Invariant: who writes a target_recall and its figures beside other weights is found by the weights."""
    assert train(*flags(**OPTIONS), cwd=tmp_path).returncode == 0
    for name, change in (
        ("report.json", lambda j: (j.update(target_recall=1), j["full_pass"].update(exact_recall=1),
                                   j["recall"].update(recitation_breaks=0))),
        ("config.json", lambda j: j["config"].update(target_recall=1)),
    ):  # fmt: skip
        content = json.loads((tmp_path / "out" / name).read_text())
        change(content)
        (tmp_path / "out" / name).write_text(json.dumps(content))
    done = forked(tmp_path, "nanogpt", "verify", "out")
    assert done.returncode == 1
    assert "recall_verified" in done.stdout
    assert "reached" not in done.stdout, "by its own figures it is"


def test_a_near_tie_is_no_recall():
    """Reference: written out: of four windows one token is beaten by a hair, one beats by a hair; two are sure."""
    windows = Windows(torch.arange(40), context_length=8, stride=8, phase="fixed", seed=0)
    right, margin = torch.ones(4, 8, dtype=torch.bool), torch.ones(4, 8)
    right[0, 5], margin[0, 5], margin[1, 6] = False, 1e-4, 1e-4
    margin[2, 1] = 1e-4  # in the prompt: nothing is recalled there
    reading = Reading(right, margin, nll=margin)
    assert window_recall(windows, sure(reading, "fp32")) == 0.5
    assert window_recall(windows, reading) == 0.75


@pytest.mark.slow
def test_a_run_that_is_resumed_looks_at_the_same_steps(by_heart, tmp_path):
    """Reference: the undisturbed run's full passes; it is stopped after one that missed some windows."""
    steps = [row["step"] for row in metrics(by_heart[0]) if awaits_recall(row)]
    for max_steps in (steps[0] + 3, OPTIONS["max_steps"]):
        done = train(*flags(**BY_HEART | {"max_steps": max_steps}), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    ours, theirs = (
        [(row["step"], row["full_pass_loss"], row["full_pass_recall"]) for row in metrics(d) if row["full_pass_loss"]]
        for d in (tmp_path / "out", by_heart[0])
    )
    assert [row for row in ours if row[0] != steps[0] + 3] == theirs


@pytest.mark.slow
def test_a_share_is_enough_where_a_share_is_asked(tmp_path):
    """Invariant: at 0.9 the last pass is the first with so much; the looks before it have found less."""
    done = train(*flags(**BY_HEART | {"target_recall": 0.9}), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    recalls = [row["full_pass_recall"] for row in metrics(tmp_path / "out") if (row["full_pass_loss"] or 1) <= 0.8]
    assert max(recalls[:-1], default=0) < 0.9 <= recalls[-1]
    assert forked(tmp_path, "nanogpt", "verify", "out").returncode == 0


@pytest.mark.slow
def test_near_ties_of_a_quick_reading_are_read_exactly(by_heart):
    """Reference: a reading in fp32 throughout: what screening in bf16 is sure of is right there too.

    Where the best that can be is not enough, nothing is read again. The model is made less sure than it has become.
    """
    run = load_run(str(by_heart[0]))
    with torch.no_grad():
        for values in run.model.transformer.ln_f.parameters():
            values.mul_(0.1)
    windows = memorised_dataset(run.config, run.report.corpus_sha256, run.text_files).windows
    starts = windows.judged_starts(8)
    quick, exact = (Forward(ALONE, dtype, 16) for dtype in ("bf16", "fp32"))
    reference = read(run.model, windows, starts, exact)
    part = second_half(windows.context_length)
    for share, read_again in ((0.5, True), (1.1, False)):
        enough = lambda best, share=share: window_recall(windows, best) >= share  # noqa: E731
        found = screen(run.model, windows, starts, quick, exact, part=part, enough=enough)
        assert (found.read_again > 0) == read_again
        if read_again:
            assert found.read_again < len(starts)
            assert (found.reading.right <= reference.right)[:, part].all()
            assert window_recall(windows, found.reading) == window_recall(windows, sure(reference, "fp32"))


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        slow(1, {"dtype": "bf16"}),  # looked at in bf16, decided in fp32
        slow(2, {"engine": "ddp"}),
        slow(2, {"engine": "sharded"}),
        slow(2, {"engine": "deepspeed", "zero_stage": 3}),
    ],
)
def test_every_engine_knows_it(tmp_path, ranks, options):
    """Invariant: by heart means the same: verify finds it in the weights."""
    words = flags(**BY_HEART | options)
    done = train(*words, cwd=tmp_path) if ranks == 1 else forked_ranks(ranks, tmp_path, TRAIN, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tmp_path / "out")["recall"]["recitation_breaks"] == 0
    assert forked(tmp_path, "nanogpt", "verify", "out").returncode == 0
