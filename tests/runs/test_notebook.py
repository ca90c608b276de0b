"""The notebook runs from top to bottom, in a kernel of its own and in plain IPython, and leaves the kernel as it was.

Its model is made smaller here, and its text shorter; the cells are run as they are but for that.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel, which the extra [dev] installs")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel, which the extra [dev] installs")
pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel, which the extra [dev] installs")

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "memorise.ipynb"
TEXT = (REPOSITORY / "nanogpt" / "assets" / "coriolanus.txt").read_text()
# What the notebook asks of its first run, and what is asked here: seconds instead of minutes.
THEIRS = 'TrainConfig.preset("demo", wandb="disabled")'
OURS = (
    'TrainConfig.preset("demo", wandb="disabled", target_recall=None, subset_tokens=100, context_length=32, '
    "batch_size=4, n_layer=2, n_head=2, n_embd=64)"
)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
# What train() must leave as it was: what each signal does, and where torch makes tensors.
BEFORE = """
import signal
import torch
from nanogpt import train

def process_state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return handlers, torch.get_default_device(), torch.get_default_dtype()

signal.signal(signal.SIGUSR1, lambda *_: None)  # one that a user has set; training sets its own
before = process_state()
"""
AFTER = "print('as it was' if process_state() == before else (before, process_state()))"


def printed(cell):
    """The text that a code cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(cell):
    """The PNG pictures that a code cell shows."""
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


def smaller():
    """The notebook, but for its first run's size."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    replace(notebook, "train", THEIRS, OURS)
    return notebook


def replace(notebook, name, theirs, ours):
    """Put ours in the place of theirs in the cell of that name."""
    (cell,) = (cell for cell in notebook.cells if cell.id == name)
    assert theirs in cell.source
    cell.source = cell.source.replace(theirs, ours)


def without_colour(text):
    """text without the escape sequences that colour it."""
    return re.sub(r"\x1b\[\d+m", "", text)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook's code cells by their ids, executed between BEFORE and AFTER; an error in any of them is raised."""
    notebook = smaller()
    cells = notebook.cells
    cells.insert(0, nbformat.v4.new_code_cell(BEFORE, id="before"))
    cells.append(nbformat.v4.new_code_cell(AFTER, id="after"))
    here = {"metadata": {"path": tmp_path_factory.mktemp("kernel")}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=here)
    client.execute(env=ENVIRONMENT)
    return {cell.id: cell for cell in cells if cell.cell_type == "code"}


def test_it_is_stored_without_outputs():
    """Invariant: a change of the notebook is a change of its sources alone."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count] == []


@pytest.mark.slow
def test_it_trains_and_recites(executed):
    """Reference: the target is reached, the text comes back as the package has it, and every score is verified."""
    assert "\ntarget reached: " in printed(executed["train"])
    assert [len(pictures(executed[name])) for name in ("memory", "loss", "recall")] == [1, 1, 1]
    assert "control text" in printed(executed["scores"])
    said, summary = without_colour(printed(executed["recite"])).strip().rsplit("\n[", 1)
    assert said[:100] == TEXT[:100]
    assert " of 100 tokens verbatim" in summary
    assert executed["verify"].outputs[-1].data["text/plain"] == "[]"


@pytest.mark.slow
def test_it_holds_the_page(executed):
    """Invariant: memory.html is in the output as an attribute, closed off from the notebook, and needs no address."""
    (output,) = executed["page"].outputs
    assert output.data["text/html"].count('"') == 2 * len(re.findall(r'=\s*"[^"]*"', output.data["text/html"]))
    assert 'sandbox="allow-scripts"' in output.data["text/html"]
    assert 'srcdoc="&lt;!DOCTYPE html&gt;' in output.data["text/html"]


@pytest.mark.slow
def test_it_memorises_a_text_of_ones_own(executed):
    """Reference: the words that the cell holds come back."""
    assert "\ntarget reached: " in printed(executed["own"])
    assert without_colour(printed(executed["own-recital"]))[:60] in executed["own"].source
    assert len(pictures(executed["own-recital"])) == 1


@pytest.mark.slow
def test_it_runs_in_plain_ipython_without_stdin(tmp_path):
    """Invariant: where nothing can be shown or asked, no cell fails, and nothing is written as an error."""
    notebook = smaller()
    for name in ("train", "own"):  # how much comes back is shown above
        replace(notebook, name, "target_recall=None,", "target_recall=None, target_loss=3,")
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    script = tmp_path / "cells.ipy"
    script.write_text("".join(f"get_ipython().run_cell({cell!r}).raise_error()\n" for cell in cells) + "print('end')\n")
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "IPython", "--colors=NoColor", script.name],
        cwd=tmp_path, env=ENVIRONMENT | {"IPYTHONDIR": str(tmp_path / "profile")},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("end\n"), done.stdout + done.stderr
    assert "Error" not in done.stdout + done.stderr
    assert "Out[" in done.stdout


@pytest.mark.slow
def test_the_kernel_is_left_as_it_was(executed):
    """Invariant: signal handlers, default device and default type after train() are those before it."""
    assert printed(executed["after"]) == "as it was\n"
