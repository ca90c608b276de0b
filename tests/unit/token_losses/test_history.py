"""What memory.npz holds, and how it stays small."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.runs import ALONE
from nanogpt.config.errors import ConfigError
from nanogpt.data.windows import Windows
from nanogpt.engine.base import StepLosses
from nanogpt.token_losses import history as module
from nanogpt.token_losses import recorder as recorder_module
from nanogpt.token_losses.history import LEVEL_NATS, MOST_LEVEL, UNSEEN, TokenHistory, levels_of, row_to_drop
from nanogpt.token_losses.recorder import TokenLossRecorder


def rows(*levels):
    """A history with a row of each of these levels at steps 10, 20, ..."""
    history = TokenHistory.empty(len(levels[0]))
    for number, each in enumerate(levels, start=1):
        history = history.with_row(10 * number, np.array(each, np.uint8))
    return history


def newest(losses):
    """A step's losses, as an engine hands them on."""
    step = StepLosses()
    step.add(losses)
    step.end_step()
    return step


def test_a_level_is_the_loss():
    """Reference: half a level off at most, up to 12.7 nats; what is above or not finite is the highest level."""
    losses = np.array([0.0, 0.024, 0.69, 5.01, 12.7, 80.0, np.inf, np.nan], np.float32)
    levels = levels_of(losses)
    assert np.abs(levels[:5] * LEVEL_NATS - losses[:5]).max() <= LEVEL_NATS / 2 + 1e-6
    assert levels[5:].tolist() == [MOST_LEVEL] * 3


def test_since_when_a_token_is_known():
    """Reference: the first row of those at the end in which its probability is above 1/2."""
    history = rows([9, 9, 0, UNSEEN], [50, 9, 50, UNSEEN], [9, 9, 50, 13])
    assert history.learnt_at().tolist() == [30, 10, -1, 30]
    assert rows([14, 13]).learnt_at().tolist() == [-1, 10]
    assert TokenHistory.empty(3).learnt_at().tolist() == [-1] * 3


def test_what_is_written_is_read(tmp_path):
    """Reference: itself, with and without a recital; a history that goes on begins with the rows up to a step."""
    history = replace(rows([1, 2], [3, 4], [5, 6]), recital=("a", "b ☃", "[c]"))
    history.save(tmp_path / "memory.npz")
    found = TokenHistory.load(tmp_path / "memory.npz")
    assert (found.steps.tolist(), found.levels.tolist(), found.recital) == (
        [10, 20, 30], [[1, 2], [3, 4], [5, 6]], ("a", "b ☃", "[c]"),
    )  # fmt: skip
    assert (found.until(29).steps.tolist(), found.until(29).recital) == ([10, 20], None)
    assert found.until(30).levels.tolist() == history.levels.tolist()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no more", (2, 4), (3,)])
def test_a_damaged_file_is_one_line(tmp_path, content):
    """Invariant: ConfigError, whatever the file holds, arrays of a shape that does not fit among it."""
    path = tmp_path / "memory.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, steps=np.arange(3), levels=np.zeros(content, np.uint8), recital=np.array((), str))
    with pytest.raises(ConfigError, match="is damaged"):
        TokenHistory.load(path)
    with pytest.raises(ConfigError, match="no such file"):
        TokenHistory.load(tmp_path / "other.npz")


@pytest.mark.parametrize(("most_rows", "most_bytes"), [(8, 2**24), (512, 8 * 5)])
def test_a_long_history_is_thinned_out(monkeypatch, most_rows, most_bytes):
    """Invariant: at most so many rows or bytes, about as far apart, from the first row to the newest."""
    monkeypatch.setattr(module, "MOST_ROWS", most_rows)
    monkeypatch.setattr(module, "MOST_BYTES", most_bytes)
    steps = []
    for step in range(1, 101):
        steps.append(step)
        if (gone := row_to_drop(steps, tokens=5)) is not None:
            del steps[gone]
        assert len(steps) == min(step, 8)
        assert (steps[0], steps[-1]) == (1, step)
    # The least of the sums of two neighbouring gaps is not above their mean, and no gap is made otherwise.
    assert np.diff(steps).max() <= 2 * (100 - 1) / (8 - 1)


def test_the_most_context_counts(tmp_path):
    """Reference: written out. Windows of 4 at 0 and 2: what both hold counts as in the first, where it is later."""
    windows = Windows(torch.arange(7), context_length=4, stride=2, phase="fixed", seed=0)
    config = SimpleNamespace(batch_size=2, context_length=4)
    starts = windows.global_batch(0, 2).tolist()
    assert sorted(starts) == [0, 2]
    losses = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])[torch.tensor(starts) // 2]
    recorder = TokenLossRecorder(config, windows, ALONE, tmp_path, history=TokenHistory.empty(7), say=pytest.fail)
    recorder.count(1, newest(losses))
    recorder.record(1)
    levels = TokenHistory.load(tmp_path / "memory.npz").levels
    assert levels.tolist() == [[UNSEEN, 20, 20, 20, 20, 40, 40]]


def test_little_context_says_little(tmp_path):
    """Reference: written out. In the first quarter of its window, 8 tokens at most, a token stays what it was.

    But for the first tokens of the text, which never have more, and for one that was not seen yet.
    """
    windows = Windows(torch.arange(24), context_length=12, stride=12, phase="fixed", seed=0)
    config = SimpleNamespace(batch_size=1, context_length=12)
    recorder = TokenLossRecorder(config, windows, ALONE, tmp_path, history=TokenHistory.empty(24), say=pytest.fail)
    starts = [windows.global_batch(step, 1).item() for step in range(4)]  # token 12 stands in both windows
    assert sorted(starts[:2]) == sorted(starts[2:]) == [0, 11]
    for step in (1, 2):
        recorder.count(step, newest(torch.full((1, 12), 1.0 if starts[step - 1] == 0 else 2.0)))
    recorder.record(2)
    recorder.count(1 + starts.index(11, 2), newest(torch.zeros(1, 12)))
    recorder.record(4)
    recorder.save()
    before, after = TokenHistory.load(tmp_path / "memory.npz").levels.tolist()
    assert before == [UNSEEN] + [20] * 12 + [40] * 11
    assert after == [UNSEEN] + [20] * 12 + [40] + [0] * 10


def test_a_disk_that_is_full_costs_one_line(tmp_path):
    """Invariant: however often it fails, and the rows are there when there is room again."""
    windows = Windows(torch.arange(5), context_length=4, stride=4, phase="fixed", seed=0)
    heard, gone = [], tmp_path / "gone"
    config = SimpleNamespace(batch_size=1, context_length=4)
    recorder = TokenLossRecorder(config, windows, ALONE, gone, history=TokenHistory.empty(5), say=heard.append)
    for step in (1, 2):
        recorder.count(step, newest(torch.zeros(1, 4)))
        recorder.record(step)
        recorder.save()
    assert len(heard) == 1
    gone.mkdir()
    recorder.save()
    assert TokenHistory.load(gone / "memory.npz").steps.tolist() == [1, 2]


def test_what_waits_for_a_row_is_bounded(tmp_path, monkeypatch):
    """Reference: the same losses with room for all: they are taken in before the row, and nothing is lost."""
    windows = Windows(torch.arange(9), context_length=4, stride=4, phase="fixed", seed=0)
    config, written = SimpleNamespace(batch_size=1, context_length=4), []
    for values in (2**22, 8):
        monkeypatch.setattr(recorder_module, "WAITING_VALUES", values)
        recorder = TokenLossRecorder(config, windows, ALONE, tmp_path, history=TokenHistory.empty(9), say=pytest.fail)
        for step in range(1, 6):
            recorder.count(step, newest(torch.full((1, 4), float(step))))
            assert len(recorder._waiting) <= values // 4
        recorder.record(5)
        written.append(TokenHistory.load(tmp_path / "memory.npz").levels.tolist())
    assert written[0] == written[1]


def test_only_the_first_rank_writes(tmp_path):
    """Invariant: no file of another rank."""
    windows = Windows(torch.arange(5), context_length=4, stride=4, phase="fixed", seed=0)
    config = SimpleNamespace(batch_size=1, context_length=4)
    world = replace(ALONE, rank=1)
    recorder = TokenLossRecorder(config, windows, world, tmp_path, history=TokenHistory.empty(5), say=pytest.fail)
    recorder.save()
    assert list(tmp_path.iterdir()) == []
