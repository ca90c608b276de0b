"""What a person at a terminal sees, drawn into a string of a known width."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from harness.rows import ROW
from nanogpt.monitor.terminal import BARS, SPARKS, TerminalLogger, sparkline, way_to_target


def drawn(width, *rows, losses=()):
    """All drawings on a terminal that is width columns wide."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    logger = TerminalLogger(0.099, losses, console)
    logger.say("a sentence")
    for row in rows:
        logger.row(row)
    logger.close()
    return console.file.getvalue()


def test_every_figure_is_shown():
    """Reference: the row."""
    shown = drawn(100, replace(ROW, loss=10.0), replace(ROW, loss=0.995, full_pass_loss=0.1))
    for part in (
        "a sentence",
        "step 10",
        "loss 0.9950",
        "50% of the way to 0.099 nats/token",
        "650 tokens/s",
        "1.6 s a step",
    ):
        assert part in shown
    for part in ("MFU 41%", "4.0 GB", "ETA 10 min (5 min to 2.0 h)", "full pass 0.1000"):
        assert part in shown
    verified = replace(ROW, full_pass_loss=0.0985, eta_s=0.0, eta_low_s=0.0, eta_high_s=0.0)
    assert "4.0 GB · full pass 0.0985" in drawn(100, verified)


def test_only_a_full_pass_has_arrived():
    """Invariant: 100% stands beside a verified target alone, however low the training loss is."""
    low = replace(ROW, loss=0.05)
    assert "99% of the way" in drawn(100, low)
    assert "100%" not in drawn(100, low, replace(low, full_pass_loss=0.1))
    assert "100% of the way" in drawn(100, replace(ROW, loss=0.15, full_pass_loss=0.098, eta_s=0.0), losses=[9.9])


def test_a_resumed_run_has_its_way_behind_it():
    """Reference: 9.9 -> 0.99 is half of 9.9 -> 0.099, whoever saw the 9.9; the curve has both."""
    shown = drawn(100, replace(ROW, loss=0.99), losses=[9.9])
    assert "50% of the way" in shown
    assert BARS[-1] + BARS[0] in shown


@pytest.mark.parametrize("width", [40, 60, 200])
def test_no_line_is_wider_than_the_terminal(width):
    """Invariant: what does not fit goes on in the next line."""
    rows = [replace(ROW, step=step, loss=11.0 / step, full_pass_loss=0.1) for step in range(1, 100)]
    lines = drawn(width, *rows).replace("\r", "\n").split("\n")
    assert max(len(line.replace("\x1b[2K", "").replace("\x1b[1A", "")) for line in lines) <= width + len("\x1b[?25h")


def test_the_curve_falls():
    """Invariant: an exponential decay is a staircase from the highest bar to the lowest, however long it is."""
    for length in (2, 8, 31, 1000):
        curve = sparkline([10.0 * 0.99**step for step in range(length)])
        assert len(curve) == min(length, SPARKS)
        assert list(curve) == sorted(curve, reverse=True)
        assert (curve[0] == BARS[-1] or length > SPARKS, curve[-1]) == (True, BARS[0])
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == BARS[0] * 2


def test_the_way_is_measured_on_the_logarithm():
    """Reference: 10 -> 1 is half of 10 -> 0.1; a loss above the first one is no way at all."""
    assert way_to_target([10.0, 1.0], 0.1) == pytest.approx(0.5)
    assert way_to_target([10.0, 12.0], 0.1) == 0.0
    assert way_to_target([10.0, 0.05], 0.1) == 1.0
    assert way_to_target([], 0.1) == 0.0
