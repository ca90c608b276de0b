"""Who stopped, by what the ranks said last."""

from nanogpt.distributed.watchdog import Reading, who_stopped


def test_a_tie_names_every_place():
    """Invariant: with all ranks alive at one place nobody is accused; few of many are listed."""
    readings = [Reading(5, 12, f"step 3, update (optim.py:{rank})") for rank in range(6)]
    line = who_stopped(readings, [each._replace(pulse=each.pulse + 3) for each in readings])
    assert line.startswith("rank 0 is at step 3, update (optim.py:0); rank 1 is at step 3")
    assert line.endswith("; and 2 more")
