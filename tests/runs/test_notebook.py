"""The notebook of examples/ runs from top to bottom, in a kernel of its own, and leaves that kernel as it was."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel, which the extra [dev] installs")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel, which the extra [dev] installs")
pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel, which the extra [dev] installs")

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "examples" / "train_and_recite.ipynb"
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


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook's code cells by their ids, executed between BEFORE and AFTER; an error in any of them is raised."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = notebook.cells
    cells.insert(0, nbformat.v4.new_code_cell(BEFORE, id="before"))
    cells.append(nbformat.v4.new_code_cell(AFTER, id="after"))
    here = {"metadata": {"path": tmp_path_factory.mktemp("kernel")}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=here)
    client.execute(env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
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
    assert printed(executed["scores"]).startswith("target_reached after ")
    assert len(pictures(executed["pictures"])) == 2
    text = (REPOSITORY / "nanogpt" / "assets" / "coriolanus.txt").read_text()
    assert printed(executed["say"]).strip() in text
    assert executed["verify"].outputs[-1].data["text/plain"] == "[]"


@pytest.mark.slow
def test_the_kernel_is_left_as_it_was(executed):
    """Invariant: signal handlers, default device and default type after train() are those before it."""
    assert printed(executed["after"]) == "as it was\n"
