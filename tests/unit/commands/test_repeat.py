"""The mean of many runs and its interval."""

from math import sqrt
from statistics import fmean, stdev

import pytest

from nanogpt.commands.repeat import summarise, t_quantile


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.7062), (2, 4.30265), (7, 2.36462), (30, 2.04227)])
def test_students_t(degrees, t):
    """Reference: published tables of the two-sided 95 % point."""
    assert t_quantile(degrees) == pytest.approx(t, abs=1e-4)


def test_the_mean_of_the_kept():
    """Reference: ten values by hand; four lose none; the interval is wider than that of the kept taken as a sample."""
    values = [10.0, 1.0, 5.0, 6.0, 4.0, 7.0, 5.5, 4.5, 6.5, 90.0]
    kept = sorted(values)[1:-1]
    found = summarise(values)
    assert (found["kept"], found["mean"], found["median"]) == (8, fmean(kept), 5.75)
    naive = t_quantile(7) * stdev(kept) / sqrt(8)
    assert found["high"] - found["mean"] == pytest.approx(found["mean"] - found["low"])
    assert found["high"] - found["mean"] > naive
    few = summarise([1.0, 2.0, 3.0, 10.0])
    half = t_quantile(3) * stdev([1.0, 2.0, 3.0, 10.0]) / 2
    assert (few["kept"], few["mean"], few["high"]) == (4, 4.0, pytest.approx(4.0 + half))


def test_a_failure_is_slower_than_any():
    """Invariant: one failure may be the slowest; with a second, or among few, there is no mean, and still a median."""
    assert summarise([5.0, 3.0, None, 4.0, 6.0])["mean"] == 5.0
    two = summarise([5.0, 3.0, None, 4.0, None, 6.0])
    assert (two["mean"], two["low"], two["median"]) == (None, None, 5.5)
    assert summarise([1.0, None])["mean"] is None
