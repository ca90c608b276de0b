"""What the stage of faults makes of how its runs ended."""

from dataclasses import replace

import pytest

from nanogpt.acceptance.stages.faults import FAULTS, FROZEN, STEPS, Drill, Drills, first_difference, judge_faults
from nanogpt.acceptance.verdict import Verdict


def drill(fault, **changed):
    """One of two ranks that came as it should, and was recovered from."""
    rank = 1 if fault.of_last else 0
    statuses = [1, 1]
    statuses[rank] = -9 if fault is FROZEN else fault.status
    right = {
        "fault": fault.name, "rank": rank, "folder": fault.folder, "statuses": tuple(statuses),
        "said": f"error: {fault.says}", "resumed_from": "step_00000002", "steps": STEPS,
        "resumed_status": 3, "resumed_said": "", "first_difference": None, "weights_sha256": "aa",
    }  # fmt: skip
    return Drill(**(right | changed))


def drills(*made):
    return Drills(kind="cpu", status=3, steps=STEPS, said="", weights_sha256="aa", drills=made)


def test_every_fault_that_is_recovered_from_passes():
    """Invariant: PASS for each, when each came and left what the undisturbed run has."""
    checks = judge_faults(drills(*map(drill, FAULTS)), ranks=2)
    assert [check.verdict for check in checks] == [Verdict.PASS] * len(FAULTS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"statuses": (3, 3)}, "ended with statuses 3, 3: error: "),  # it did not happen
        ({"resumed_from": None}, "began anew"),
        ({"steps": 0}, f"0 of {STEPS} steps have figures"),
        ({"resumed_status": 1, "resumed_said": "no"}, "the same command then ended with 1: no"),
        ({"resumed_status": None}, "none (it was killed)"),
        ({"first_difference": 6}, "step 6 differs from the undisturbed run's"),
        ({"weights_sha256": "bb"}, "the weights differ"),
        ({"weights_sha256": None}, "the weights differ"),
    ],
)
def test_what_is_not_recovered_from_fails(changed, said):
    """Invariant: each way not to be as if nothing had happened is a FAIL that says which."""
    checks = judge_faults(drills(*(drill(fault, **changed) for fault in FAULTS[1:2])), ranks=2)
    assert checks[1].verdict is Verdict.FAIL
    assert said in checks[1].found


def test_what_was_not_made_is_unknown():
    """Invariant: no time is no PASS; alone nobody can notice a frozen rank."""
    checks = judge_faults(drills(drill(FAULTS[0])), ranks=1)
    assert {check.verdict for check in checks[1:]} == {Verdict.UNKNOWN}
    assert checks[-1].found == "one rank: nobody is there to notice"


def test_an_undisturbed_run_that_fails_fails_the_stage():
    """Invariant: with nothing to compare with nothing passes."""
    for status, steps, sha256 in ((1, STEPS, "aa"), (3, 0, "aa"), (3, STEPS, None)):
        undisturbed = Drills(kind="cpu", status=status, steps=steps, said="error: x", weights_sha256=sha256)
        (check,) = judge_faults(undisturbed, ranks=2)
        assert check.verdict is Verdict.FAIL
        assert "error: x" in check.found


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.says], ids=lambda fault: fault.folder)
def test_a_fault_that_did_not_come_shows_nothing(fault):
    """Invariant: the right status with other last words is a FAIL: another thing has happened."""
    (check,) = [c for c in judge_faults(drills(drill(fault, said="error: y")), ranks=2) if c.name == fault.name]
    assert check.verdict is Verdict.FAIL


def test_the_first_difference():
    """Invariant: the first step with another figure, or with one on one side alone; none where all are alike."""
    rows = {1: (2.0, 1.0), 2: (1.5, 1.0)}
    assert first_difference(rows, dict(rows)) is None
    assert first_difference(rows | {2: (1.5, 1.1)}, rows) == 2
    assert first_difference({1: (2.0, 1.0)}, rows) == 2
    assert first_difference({}, {}) is None


def test_a_device_that_sums_in_any_order():
    """Invariant: where a GPU does not compute the same twice, another last bit is UNKNOWN; a CPU's is FAIL."""
    again, killed = drill(FAULTS[0], first_difference=2), drill(FAULTS[1], weights_sha256="bb")
    made = drills(again, killed)
    assert [check.verdict for check in judge_faults(made, ranks=2)[:2]] == [Verdict.FAIL] * 2
    on_gpus = replace(made, kind="cuda")
    assert [check.verdict for check in judge_faults(on_gpus, ranks=2)[:2]] == [Verdict.UNKNOWN] * 2
    only_killed = replace(on_gpus, drills=(drill(FAULTS[0]), killed))
    assert judge_faults(only_killed, ranks=2)[1].verdict is Verdict.FAIL
