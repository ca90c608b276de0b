"""The fixed job is the curve on record, and a curve that is not is found out."""

from dataclasses import replace

import pytest

from harness.runs import ALONE
from nanogpt.acceptance.stages.numerics import (
    DTYPES,
    EMULATED_STEPS,
    STEPS,
    Curve,
    departure,
    golden,
    judge_numerics,
    measure_alone,
)
from nanogpt.acceptance.verdict import Verdict


def on_record(dtype="fp32", rank=None, steps=STEPS, kind="cpu", **wrong):
    """The curve on record, but for its losses at some steps, which are so many bands off: {step: bands}."""
    right = golden(dtype)
    losses = [
        loss * (1 + wrong.get(f"step_{i + 1}", 0) * band)
        for i, (loss, band) in enumerate(zip(right.losses, right.loss_band, strict=True))
    ]
    return Curve(
        dtype=dtype, kind=kind, engine="single" if rank is not None else "ddp", rank=rank, losses=tuple(losses[:steps]),
        grad_norms=right.grad_norms[:steps],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_golden_curve_is_whole(dtype):
    """Invariant: a loss, a norm and a band for each step; the loss falls, no band narrows."""
    right = golden(dtype)
    for figures in (right.losses, right.grad_norms, right.loss_band, right.grad_norm_band):
        assert len(figures) == STEPS
        assert min(figures) > 0
    assert right.losses[-1] < 0.8 * right.losses[0]
    for band in (right.loss_band, right.grad_norm_band):
        assert list(band) == sorted(band)


def test_this_machine_trains_along_it():
    """Reference: the curves on record, in fp32 and bf16, each within its bands."""
    checks = judge_numerics(measure_alone(ALONE))
    assert [check.verdict for check in checks] == [Verdict.PASS, Verdict.PASS], checks


def test_a_step_beyond_its_band_is_named():
    """Invariant: at 0.99 of its band a loss passes, at 1.01 its step is named, first of all that are."""
    assert departure(on_record(step_7=0.99), golden("fp32")) == ""
    assert departure(on_record(step_7=1.01, step_9=5), golden("fp32")).startswith("the loss of step 7 is +")
    assert departure(on_record(step_12=-2), golden("fp32")).startswith("the loss of step 12 is -")


def test_a_norm_counts_too():
    """Invariant: losses on record do not make up for one gradient norm that is half of what it should be."""
    norms = list(golden("fp32").grad_norms)
    norms[4] /= 2
    assert departure(replace(on_record(), grad_norms=tuple(norms)), golden("fp32")).startswith(
        "the gradient norm of step 5"
    )


def test_what_is_not_finite_is_outside():
    """Invariant: a loss that is None, as JSON has a NaN, is in no band."""
    losses = (*golden("fp32").losses[:-1], None)
    curve = replace(on_record(), losses=losses)
    assert departure(curve, golden("fp32")) == f"the loss of step {STEPS} is not finite"
    assert judge_numerics([curve])[0].verdict is Verdict.FAIL


def test_a_rank_that_is_wrong_alone_is_blamed():
    """Invariant: of three ranks alone the one whose curve leaves the band is named, and no other."""
    curves = [on_record(rank=0), on_record(rank=1, step_3=4), on_record(rank=2)]
    (check,) = judge_numerics(curves)
    assert (check.verdict, check.ranks) == (Verdict.FAIL, (1,))
    assert "rank 1: the loss of step 3" in check.found


def test_replicas_that_differ_fail_a_curve_in_its_band():
    """Invariant: what the ranks hold unlike is no PASS, however right the losses are."""
    check = judge_numerics([replace(on_record(), failure="rank 1 differs from the other 2 ranks in x")])[0]
    assert check.verdict is Verdict.FAIL
    assert "rank 1 differs" in check.found


def test_an_engine_that_cannot_train_is_unknown():
    """Invariant: no curve is no PASS, and the reason is there."""
    why = "needs equal micro-batches"
    curve = Curve(dtype="bf16", kind="cpu", engine="ZeRO 2", losses=(), grad_norms=(), failure=why)
    assert [(c.verdict, c.found) for c in judge_numerics([curve])] == [(Verdict.UNKNOWN, why)]


def test_a_short_curve_is_held_to_its_own_steps():
    """Invariant: five steps of bf16 that a CPU emulates are compared with the first five on record."""
    curve = on_record("bf16", steps=EMULATED_STEPS)
    check = judge_numerics([curve])[0]
    assert check.verdict is Verdict.PASS
    assert check.expected.startswith(f"{EMULATED_STEPS} losses")


def test_a_curve_that_ends_early_is_wrong():
    """Invariant: five steps of fp32, or none alone, are no curve, however right."""
    assert judge_numerics([on_record(steps=5)])[0].verdict is Verdict.FAIL
    (check,) = judge_numerics([on_record(rank=0), on_record(rank=1, steps=0)])
    assert (check.verdict, check.ranks) == (Verdict.FAIL, (1,))


@pytest.mark.parametrize(("bands", "verdict"), [(0.9, Verdict.PASS), (9, Verdict.UNKNOWN), (11, Verdict.FAIL)])
def test_a_device_that_is_not_on_record(bands, verdict):
    """Invariant: a GPU within ten bands may be right; beyond, it is as wrong as a CPU beyond one."""
    assert judge_numerics([on_record(kind="cuda", step_7=bands)])[0].verdict is verdict
    alone = [on_record(kind="cuda", rank=rank, step_7=bands) for rank in range(2)]
    assert judge_numerics(alone)[0].verdict is verdict
    assert judge_numerics([on_record(step_7=11)])[0].verdict is Verdict.FAIL


def test_only_who_is_certainly_wrong_is_blamed():
    """Invariant: of GPUs that are all a little outside the one that is far outside is named alone."""
    curves = [on_record(kind="cuda", rank=rank, step_7=1000 if rank == 1 else 2) for rank in range(3)]
    (check,) = judge_numerics(curves)
    assert (check.verdict, check.ranks) == (Verdict.FAIL, (1,))
