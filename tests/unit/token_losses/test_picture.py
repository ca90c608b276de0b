"""memory.png: what its heat map shows, of a short text and of a long one."""

from dataclasses import replace

import numpy as np
import pytest

from harness.memories import bytes_of, memory
from nanogpt.plots.loss_plot import save
from nanogpt.token_losses.history import LEVEL_NATS, UNSEEN
from nanogpt.token_losses.picture import COLUMNS, draw_memory, pooled


def test_a_short_text_has_a_column_a_token():
    """Reference: the cube root of each probability; NaN where a token was not trained on."""
    levels = np.array([[0, 20, 254, UNSEEN], [UNSEEN, 1, 2, 3]], np.uint8)
    expected = np.where(levels == UNSEEN, np.nan, np.exp(-levels.astype(float) * LEVEL_NATS / 3))
    assert pooled(levels) == pytest.approx(expected, nan_ok=True)


def test_a_long_text_is_pooled():
    """Reference: the mean over each stretch, of those tokens that were seen."""
    levels = np.full((1, 4 * COLUMNS), 20, np.uint8)
    levels[0, :4], levels[0, 4:6] = UNSEEN, UNSEEN
    found = pooled(levels)
    assert found.shape == (1, COLUMNS)
    assert np.isnan(found[0, 0])
    assert found[0, 1:] == pytest.approx(np.exp(-1 / 3))


def test_the_picture_shows_the_history(tmp_path):
    """Invariant: the heat map spans the run and the text; its last line is the newest row. A $ in a title is a $."""
    tokens = bytes_of("To be, or not to be, that is the question")
    history, curve = memory(tokens, rows=9, last=50)
    curve.loss[2] = float("nan")
    figure = draw_memory(history, curve, title="$x$")
    image = figure.axes[0].get_images()[0]
    assert image.get_extent() == [0, len(tokens), 50, 0]
    assert image.get_array()[-1].filled(np.nan) == pytest.approx(pooled(history.levels)[-1], nan_ok=True)
    save(figure, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_one_row_is_a_picture_too(tmp_path):
    """Invariant: a run that has just begun can be drawn."""
    history, curve = memory(bytes_of("a b c"), rows=3, last=9)
    save(draw_memory(history.until(0), replace(curve), title="t"), tmp_path / "memory.png")
