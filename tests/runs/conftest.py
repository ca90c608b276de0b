"""Runs that several test files compare with, or go on with."""

import os

import pytest

from harness.resuming import go, outcome


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """outcome() of a run of each engine that nobody disturbed, when first asked for."""
    known = {}

    def of(engine):
        if engine not in known:
            cwd = tmp_path_factory.mktemp("uninterrupted")
            done = go(cwd, engine)
            assert done.returncode == 0, done.stderr
            known[engine] = outcome(cwd)
        return known[engine]

    return of


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """The directory of a run of 8 steps, with checkpoints of steps 4 and 8."""
    cwd = tmp_path_factory.mktemp("stopped")
    assert go(cwd, max_steps=8, checkpoint_every=4).returncode == 3
    assert sorted(os.listdir(cwd / "out" / "checkpoints")) == ["latest", "step_00000004", "step_00000008"]
    return cwd
