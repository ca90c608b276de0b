"""Which steps a profile holds."""

import pytest

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig


@pytest.mark.parametrize("value", ["13:10", "10:10", "0:3", "-1:3", "10", "10:", ":10", "1:9:2", "ten:20", "1.5:3"])
def test_other_ranges_are_refused(value):
    """Invariant: whatever is not START:STOP with 1 <= START < STOP is a ConfigError that names the option."""
    with pytest.raises(ConfigError, match=f"^--profile_steps={value} must be START:STOP"):
        TrainConfig(profile_steps=value)


def test_steps_are_counted_from_one():
    """Reference: Python's slices."""
    assert list(TrainConfig(profile_steps="10:13").profiled_steps) == [10, 11, 12]
    assert list(TrainConfig().profiled_steps) == []
