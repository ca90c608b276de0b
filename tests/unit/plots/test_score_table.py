"""What the table of scores says of a text that repeats itself."""

import json

from nanogpt.plots.score_table import control_warning, score_table
from nanogpt.storage.report import Report


def test_a_control_that_comes_back_is_told(finished, tmp_path):
    """Invariant: a text that was not trained on and comes back shows that the recall is no memory; else no word."""
    content = json.loads((finished[0] / "report.json").read_text())
    path = tmp_path / "report.json"
    known = "warning: 98.4% of the prompts of the control text"
    for recalled, prompts, said in ((0.0, 64, ""), (0.09, 64, ""), (0.984, 64, known), (0.984, 7, "")):
        content["control"]["recall"] |= {"exact_recall": recalled, "exact_recall_prompts": prompts}
        path.write_text(json.dumps(content))
        told = Report.read(path, of="a run")
        warning = control_warning(told)
        assert warning.startswith(said)
        assert bool(warning) is bool(said)
        assert ("warning" in score_table(told)) is bool(said)
