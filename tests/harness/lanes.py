"""Which tests a plain pytest runs, on how many workers, and at its end what it left out.

pytest                             the fast lane: all but what is marked slow or slurm
pytest --all                       all of them
pytest -m slow                     one lane: -m decides by itself
pytest tests/runs/test_parity.py   whoever names a file, or a test in it, or tests/slurm, gets its slow tests too
"""

import os
from collections import Counter
from pathlib import Path

import pytest

LANES = {"slow": "slow", "slurm": "with a Slurm cluster"}  # marker: what it is called
COUNTS = pytest.StashKey[Counter]()


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests and those with a Slurm cluster too")


def pytest_configure(config):
    config.stash[COUNTS] = Counter()


def _named_files(config):
    """The test files that the command line names, or their lane's folder."""
    words = [Path(word.partition("::")[0]) for word in config.args]
    named = {(config.invocation_params.dir / word).resolve() for word in words}
    return {path for path in named if path.suffix == ".py" or path.name in LANES}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what is in another lane than the fast one."""
    if config.option.all or config.option.markexpr:
        return
    named, kept, left_out = _named_files(config), [], []
    for item in items:
        lane = next((name for name in LANES if item.get_closest_marker(name)), None)
        if lane is None or not named.isdisjoint((item.path.resolve(), item.path.resolve().parent)):
            kept.append(item)
        else:
            left_out.append(item)
            config.stash[COUNTS][lane] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A worker more than there are CPUs, as tests wait; none for one file, whose tests stay together."""
    if len(_named_files(config)) == 1 == len(config.args):
        return 0
    return min(len(os.sched_getaffinity(0)) + 1, 16)


def pytest_sessionfinish(session):
    """A worker tells the controller what it left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[COUNTS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Each worker collects all tests, and one that crashed tells nothing: the largest count is right."""
    node.config.stash[COUNTS] |= Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter, config):
    """What was left out, what was skipped and why, and how to run all."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    if left_out := config.stash[COUNTS]:
        counts = " and ".join(f"{left_out[lane]} {name}" for lane, name in LANES.items() if left_out[lane])
        terminalreporter.write_line(f"the fast lane: {counts} were left out; pytest --all runs them too")


def slow(*values):
    """One case of a parametrized test in the slow lane."""
    return pytest.param(*values, marks=pytest.mark.slow)
