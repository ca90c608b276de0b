"""How a run ends that was over before it was started again."""

from dataclasses import replace

import pytest

from harness.copier import plan_of
from harness.runs import ALONE
from nanogpt.storage.resume import ResumePoint
from nanogpt.training.endings import ended_before
from nanogpt.training.report import make_report, write_report
from nanogpt.training.state import TrainState

DAMAGE = {
    "none": lambda text: text,
    "another version's": lambda text: text.replace('"format_version": ', '"format_version": 9'),
    "half": lambda text: text[:100],
    "without a key": lambda text: text.replace('"train_s"', '"seconds"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        ("target_reached", 0, "has reached its target already: nothing to do; to train anew, name another --out_dir"),
        ("max_minutes", 3, "has spent its --max_minutes already: nothing to do; a larger --max_minutes goes on"),
    ],
)
def test_a_run_that_is_over(tmp_path, capsys, ended, status, said, damage):
    """Invariant: the same status again and what would go on, whether its report can be read or not; the first rank's.

    That it is over is known without the report, which is the result's where it can be read.
    """
    plan = plan_of(tmp_path)
    state = TrainState.of(plan.config, judged_windows=27, launched_at=0.0)
    report = make_report(ended, 0.05, plan, state, ALONE, None)
    write_report(tmp_path, report)
    path = tmp_path / "report.json"
    path.write_text(DAMAGE[damage](path.read_text()))
    result = ended_before(ResumePoint(tmp_path, ended=ended), ALONE)
    assert (result.status, result.exit_reason) == (status, ended)
    assert result.report == (report if damage == "none" else None)
    assert capsys.readouterr().out == f"{tmp_path} {said}\n"
    other = ended_before(ResumePoint(tmp_path, ended=ended), replace(ALONE, rank=1, size=2))
    assert (other.status, other.report, capsys.readouterr().out) == (status, None, "")
