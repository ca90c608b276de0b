"""Who is slow is named once, when it has been so for a while."""

from math import nan

from nanogpt.monitor.meters import ROWS, SLOW, Slowest, SlowRanks


def watched(rows, windows=(5, 5, 5)):
    """What was said at each of rows, and the slowest rank of the last."""
    said, lines = [], []
    slow_ranks = SlowRanks(["node0", "node0", "node1"], windows=windows, say=lines.append)
    for own_s in rows:
        slowest = slow_ranks.observe(own_s)
        said.append(len(lines))
    return said, slowest, lines


def test_a_rank_that_stays_slow_is_named_once():
    """Reference: by hand: at the fifth row in a row, and again after it was as fast as the others."""
    slow, even = [0.1, 0.1, 0.15], [0.1, 0.1, 0.1]
    said, slowest, lines = watched([slow] * (ROWS + 3) + [even] + [slow] * ROWS)
    assert said == [0] * (ROWS - 1) + [1] * (4 + ROWS) + [2]
    assert (slowest.rank, slowest.host, round(slowest.ratio, 6)) == (2, "node1", 1.5)
    assert lines[0].endswith("own work in a step: rank 2 on node1 (1.50 times); the others wait")


def test_ranks_of_a_slow_node_are_all_named():
    """Invariant: whichever of them is the slowest, which changes from row to row."""
    turns = [[0.1, 0.1, 0.1, 0.2, 0.19], [0.1, 0.1, 0.1, 0.19, 0.2]]
    lines = []
    slow_ranks = SlowRanks(["a", "a", "a", "b", "b"], windows=[2, 2, 2, 2, 2], say=lines.append)
    for own_s in turns * ROWS:
        slow_ranks.observe(own_s)
    (line,) = lines
    assert "rank 3 on b" in line
    assert "rank 4 on b" in line


def test_what_is_no_slow_rank():
    """Invariant: another one at each row, more windows, a little longer, and rows without a figure warn of nothing."""
    turns = [[0.1, 0.1, 0.2], [0.1, 0.2, 0.1]]
    assert not watched(turns * ROWS)[2]
    assert not watched([[0.1, 0.1, 0.1 * SLOW * 0.99]] * 2 * ROWS)[2]
    assert not watched([[0.1, 0.1, 0.2]] * 2 * ROWS, windows=(1, 1, 2))[2]
    assert watched([[0.1, 0.1, 0.2]] * 2 * ROWS, windows=(1, 2, 2))[2], "the median rank has two as well"
    for unknown in (nan, 0.0):
        assert watched([[0.1, 0.2, unknown]] * 2 * ROWS)[1:] == (Slowest(), [])
