"""How a run that has ended is told of: its report, and the status of its process."""

import json
from math import inf, nan

import pytest

from harness.copier import plan_of
from harness.runs import ALONE
from nanogpt.config.errors import RunError
from nanogpt.storage.report import Report
from nanogpt.training.report import EXIT_STATUS, Result, make_report, write_report
from nanogpt.training.state import TrainState


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_the_status_of_the_process(tmp_path, monkeypatch, by_torchrun):
    """Reference: written out, as scripts rely on it; torchrun restarts what fails, and a stop is no failure."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # its default
    told = {reason: Result(reason, tmp_path).status for reason in EXIT_STATUS}
    assert told == {
        "target_reached": 0, "max_steps": 3, "max_minutes": 3, "stopped": 0 if by_torchrun else 4, "non_finite": 1,
        "lost": 1,
    }  # fmt: skip


@pytest.mark.parametrize("figure", [nan, inf])
def test_a_report_of_a_run_without_figures(tmp_path, figure):
    """Invariant: before an engine and a finite loss it is strict JSON that is read back as it was, control or none."""
    plan = plan_of(tmp_path)
    state = TrainState.of(plan.config, judged_windows=27, launched_at=0.0)
    state.lr = figure
    report = make_report("stopped", figure, plan, state, ALONE, None)
    write_report(tmp_path, report)
    told = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (told["loss"], told["final_learning_rate"], told["scores_precision"]) == (None, None, None)
    assert (told["reached"], told["compiled"], told["cuda_graphs"]) == (False, False, False)
    assert told["control_note"] is None
    assert Report.read(tmp_path / "report.json", of="a run") == report


def test_a_report_that_cannot_be_written(tmp_path):
    """Invariant: a run that has ended without its report has failed, in one line that says what to do."""
    plan = plan_of(tmp_path)
    state = TrainState.of(plan.config, judged_windows=27, launched_at=0.0)
    report = make_report("target_reached", 0.05, plan, state, ALONE, None)
    with pytest.raises(RunError, match=r"^\S+/gone/report.json cannot be written \(.+\): make room and start again$"):
        write_report(tmp_path / "gone", report)
