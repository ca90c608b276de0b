"""One curve at any world size: loss and gradient norm of 1, 2, 3 and 8 gloo ranks, with and without accumulation.

Adam hides a gradient that is off by a factor, so the gradient norm is compared too (torchtitan PR 2323).
"""

import json
import math

import pytest

from harness.forks import forked_ranks, train
from harness.lanes import slow
from harness.runs import TRAIN, WORKERS, assert_verified, flags, metrics, report

STEPS = 20
OPTIONS = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "subset_tokens": 100, "context_length": 16, "learning_rate": 1e-3,
    "dtype": "fp32", "max_steps": STEPS, "log_every": 1,
}  # fmt: skip
# fp32 sums in another order differ by about 1e-7 of their size; over 20 updates the difference grew to 1.7e-7 (loss)
# and 2.8e-7 (norm) when measured. A wrong weight for one row of sixteen would show as 1e-2.
TOLERANCE = {"loss": 1e-6, "grad_norm": 2e-6}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The curve and report of one process without accumulation."""
    cwd = tmp_path_factory.mktemp("reference")
    done = train(*flags(**OPTIONS, out_dir="out"), cwd=cwd)
    assert done.returncode == 3, done.stderr
    return metrics(cwd / "out"), report(cwd / "out")


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [slow(1, 3), (2, 3), slow(3, 6), slow(3, 2), slow(8, 2)])
def test_the_curve_is_that_of_one_process(reference, tmp_path, ranks, micro_batch_size):
    """Reference: one process without accumulation: each step's loss, gradient norm, full pass and recall."""
    options = flags(**OPTIONS, micro_batch_size=micro_batch_size, out_dir="out")
    done = train(*options, cwd=tmp_path) if ranks == 1 else forked_ranks(ranks, tmp_path, TRAIN, *options)
    assert done.returncode == 3, done.stderr
    rows, told = metrics(tmp_path / "out"), report(tmp_path / "out")
    expected_rows, expected = reference
    assert told["world_size"] == ranks
    assert told["engine"] == ("single" if ranks == 1 else "ddp")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for key, tolerance in TOLERANCE.items():
            assert row[key] == pytest.approx(expected_row[key], rel=tolerance), (row["step"], key)
    assert told["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert told["strided_loss"] == pytest.approx(expected["strided_loss"], rel=1e-5)
    assert told["recall"]["exact_recall"] == expected["recall"]["exact_recall"]
    assert_verified(tmp_path / "out")


@pytest.mark.slow
def test_a_broken_model_stops_every_rank(tmp_path):
    """Invariant: all ranks count the same refused steps and leave together."""
    options = OPTIONS | {"learning_rate": 1e30, "max_bad_steps": 3, "max_steps": 60}
    done = forked_ranks(2, tmp_path, TRAIN, *flags(**options, out_dir="out"))
    assert done.returncode == 1
    assert "error: 3 steps in a row had a non-finite loss or gradient" in done.stderr
    assert report(tmp_path / "out")["exit_reason"] == "non_finite"


@pytest.mark.parametrize(
    ("name", "zero_stage"),
    [
        ("ddp", None),
        ("sharded", None),
        slow("deepspeed", 0),
        slow("deepspeed", 1),
        slow("deepspeed", 2),
        ("deepspeed", 3),
    ],
)
def test_a_loss_lost_on_one_rank_is_refused_by_all(name, zero_stage, tmp_path):
    """Invariant: an infinite or NaN loss on rank 1 alone, with finite gradients, changes no weight; the next step does.

    The clean steps before and after have the norm of one another's curve: what was refused leaves no gradient behind.
    """
    stage = [] if zero_stage is None else [f"--zero_stage={zero_stage}"]
    done = forked_ranks(2, tmp_path, WORKERS / "lost_loss_worker.py", f"--engine={name}", *stage)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        norms, changed = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert [math.isfinite(norm) for norm in norms] == [True, False, False, True]
        assert norms[3] == pytest.approx(norms[0], rel=0.2), "one small step further on the same batch"
        if rank == 0 or zero_stage != 3:  # where the first rank alone is given the weights
            assert changed == [True, False, False, True], rank


def test_all_ranks_leave_when_the_first_ones_time_is_up(tmp_path):
    """Invariant: max_minutes ends a run of several ranks without a hang, at one step."""
    options = {**OPTIONS, "max_steps": "none", "max_minutes": 0.05}
    done = forked_ranks(2, tmp_path, TRAIN, *flags(**options, out_dir="out"))
    told = report(tmp_path / "out")
    assert (done.returncode, told["exit_reason"]) == (3, "max_minutes")
    assert metrics(tmp_path / "out")[-1]["step"] == told["steps"]


@pytest.mark.slow
def test_eight_ranks_reach_a_target(tmp_path):
    """Invariant: 8 processes and the fast recipe end with status 0 and a verified target."""
    options = {"n_layer": 2, "n_head": 2, "n_embd": 32, "subset_tokens": 100, "context_length": 32, "recipe": "fast"}
    options |= {"target_loss": 6.0, "max_steps": 400}
    done = forked_ranks(8, tmp_path, TRAIN, *flags(**options, out_dir="out"))
    assert done.returncode == 0, done.stdout + done.stderr
    told = report(tmp_path / "out")
    assert (told["reached"], told["world_size"]) == (True, 8)
    assert done.stdout.count("target reached") == 1
    assert told["device_s"] == pytest.approx(8 * told["train_s"])
