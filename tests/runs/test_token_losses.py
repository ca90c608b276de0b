"""memory.npz of whole runs: whose losses it holds, on any number of ranks, after a stop, and what plot makes of it."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from harness.forks import forked, forked_ranks, train
from harness.lanes import slow
from harness.runs import TRAIN, flags
from nanogpt.data.corpus import read_corpus
from nanogpt.data.tokenizer import encode
from nanogpt.data.windows import Windows
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.token_losses.history import LEVEL_NATS, UNSEEN, TokenHistory

MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "context_length": 32, "subset_tokens": 300}
OPTIONS = MODEL | {"batch_size": 6, "learning_rate": 3e-3, "dtype": "fp32", "log_every": 3, "max_steps": 12}


def history(directory):
    """What its memory.npz holds."""
    return TokenHistory.load(directory / "memory.npz")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    cwd = tmp_path_factory.mktemp("alone")
    assert train(*flags(**OPTIONS), cwd=cwd).returncode == 3
    return cwd / "out"


def test_the_first_step_is_the_new_models(tmp_path):
    """Reference: torch's cross-entropy of a model as a run begins, over the windows of its first step."""
    assert train(*flags(**OPTIONS | {"max_steps": 1, "log_every": 1}), cwd=tmp_path).returncode == 3
    found = history(tmp_path / "out")
    ids = torch.tensor(encode(read_corpus("builtin").text)[:300])
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32))
    expected = torch.full((300,), -1.0)
    windows = Windows(ids, context_length=32, stride=32, phase="random", seed=0)
    for start in windows.global_batch(0, 6).tolist():
        at = torch.arange(start, start + 33) % 300
        expected[at[1:]] = F.cross_entropy(model(ids[at[:-1]][None])[0], ids[at[1:]], reduction="none").detach()
    expected[0] = -1.0  # after the text's end: not kept
    seen = expected >= 0
    assert found.steps.tolist() == [1]
    assert ((found.levels[0] == UNSEEN) == ~seen.numpy()).all()
    off = np.abs(found.levels[0][seen.numpy()] * LEVEL_NATS - expected[seen].numpy())
    assert off.max() <= LEVEL_NATS / 2 + 1e-4


def test_a_row_for_each_row(alone):
    """Invariant: the steps of metrics.jsonl; after an epoch each token but the first has been seen; a recital."""
    found = history(alone)
    assert found.steps.tolist() == [3, 6, 9, 12]
    assert (found.levels[:, 0] == UNSEEN).all()
    assert (found.levels[-1, 1:] != UNSEEN).all()
    assert found.recital is not None
    assert "the model says" in found.recital[2]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"engine": "ddp"}),
        slow(3, {"engine": "ddp", "micro_batch_size": 1}),
        slow(2, {"engine": "sharded"}),
        slow(2, {"engine": "deepspeed", "zero_stage": 1}),
        slow(3, {"engine": "deepspeed", "zero_stage": 3}),
    ],
)
def test_any_number_of_ranks(alone, tmp_path, ranks, options):
    """Reference: one process. A level apart at most, where a last bit decides how a loss is rounded."""
    done = forked_ranks(ranks, tmp_path, TRAIN, *flags(**OPTIONS | options))
    assert done.returncode == 3, done.stderr
    expected, found = history(alone), history(tmp_path / "out")
    assert found.steps.tolist() == expected.steps.tolist()
    differing = found.levels != expected.levels
    assert np.abs(found.levels.astype(int) - expected.levels).max() <= 1
    assert differing.mean() < 0.01
    assert (differing & ((found.levels == UNSEEN) | (expected.levels == UNSEEN))).sum() == 0


@pytest.mark.parametrize("stopped_at", [6, 7])
def test_a_run_that_goes_on(alone, tmp_path, stopped_at):
    """Reference: the undisturbed run; where it stopped it has a row besides."""
    assert train(*flags(**OPTIONS | {"max_steps": stopped_at}), cwd=tmp_path).returncode == 3
    assert train(*flags(**OPTIONS), cwd=tmp_path).returncode == 3
    expected, found = history(alone), history(tmp_path / "out")
    assert found.steps.tolist() == sorted({*expected.steps.tolist(), stopped_at})
    assert (found.levels[np.isin(found.steps, expected.steps)] == expected.levels).all()


def test_nothing_of_another_end_stays(alone, tmp_path):
    """Invariant: a run that goes on drops the recital and the pictures of its end before its next row."""
    shutil.copytree(alone, tmp_path / "out")
    options = OPTIONS | {"max_steps": 20, "log_every": 100}
    patch = "import nanogpt.training.trainer as t; t.Trainer.run = lambda self: 1 / 0"
    (tmp_path / "start.py").write_text(f"{patch}; import train_overfit; train_overfit.run()")
    done = forked(tmp_path, tmp_path / "start.py", *flags(**options))
    assert "ZeroDivisionError" in done.stderr
    found = history(tmp_path / "out")
    assert (found.recital, found.steps.tolist()) == (None, [3, 6, 9, 12])
    assert not (tmp_path / "out" / "memory.png").exists()


def test_plot_writes_page_and_picture_again(alone, tmp_path):
    """Reference: the files of the run itself."""
    names = ("memory.html", "memory.png")
    before = [(alone / name).read_bytes() for name in names]
    for name in names:
        (alone / name).unlink()
    done = forked(tmp_path, "nanogpt", "plot", "--memory", alone)
    assert (done.returncode, done.stderr) == (0, "")
    assert [(alone / name).read_bytes() for name in names] == before
    (alone / "memory.npz").rename(tmp_path / "aside.npz")
    done = forked(tmp_path, "nanogpt", "plot", f"--memory={alone}")
    (tmp_path / "aside.npz").rename(alone / "memory.npz")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "memory.npz: no such file" in done.stderr


@pytest.mark.parametrize("words", [[], ["{run}", "--memory={run}"]])
def test_plot_wants_runs_or_a_memory(alone, tmp_path, words):
    """Invariant: one line, status 2, for neither and for both."""
    done = forked(tmp_path, "nanogpt", "plot", *(word.format(run=alone) for word in words))
    assert (done.returncode, done.stderr) == (2, "error: give either RUN_DIR, one or more, or --memory=RUN_DIR\n")
