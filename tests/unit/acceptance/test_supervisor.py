"""Processes that do a rank's part: what they give, how they end, and that none is left."""

import os
import signal
import time
from functools import partial

import pytest
import torch.distributed as dist

from harness.runs import ALONE
from nanogpt.acceptance.child import Job, Outcome
from nanogpt.acceptance.supervisor import RanksLost, Supervisor, _told, to_blame
from nanogpt.distributed.world import World


def give(world: World, value: object) -> tuple[object, int, int]:
    return value, world.size, os.getpid()


def fail(world: World) -> None:
    print("some words")
    raise ValueError("no such luck")


def hang(world: World) -> None:
    print(os.getpid(), flush=True)
    time.sleep(600)


@pytest.fixture
def supervisor(tmp_path):
    """Of one rank, whose server of processes has been started."""
    supervisor = Supervisor(ALONE, None, logs=tmp_path / "logs")
    assert supervisor.run(Job("first", work=partial(give, value=0)))[0].status == 0
    return supervisor


def test_work_gives_its_value(supervisor, tmp_path):
    """Invariant: what a function returns in a process of its own comes back, and a log without a word goes."""
    (outcome,) = supervisor.run(Job("gives", work=partial(give, value=[1, "two"])))
    assert (outcome.status, outcome.value[:2]) == (0, ([1, "two"], 1))
    assert outcome.value[2] != os.getpid()
    assert list((tmp_path / "logs").iterdir()) == []


def test_what_fails_says_why(supervisor, tmp_path):
    """Invariant: an exception is status 1 and its last line, and the log keeps the rest."""
    (outcome,) = supervisor.run(Job("fails", work=fail))
    assert (outcome.status, outcome.said) == (1, "ValueError: no such luck")
    assert "some words" in (tmp_path / "logs" / "fails.rank_0.log").read_text()


def test_what_hangs_is_killed(supervisor, tmp_path):
    """Invariant: at its limit a process is killed, the outcome says so, and it is gone."""
    (outcome,) = supervisor.run(Job("hangs", work=hang, limit_s=2))
    assert (outcome.status, outcome.said) == (None, "killed after 2 s")
    pid = int((tmp_path / "logs" / "hangs.rank_0.log").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_command_is_the_program(supervisor):
    """Invariant: words are run as `nanogpt WORDS`, with its status and its last line."""
    (outcome,) = supervisor.run(Job("command", words=("verify", "/nowhere")))
    assert (outcome.status, outcome.said) == (2, "error: /nowhere: no such run directory")


def test_a_signal_is_passed_on(supervisor, tmp_path):
    """Invariant: what watch names is sent: SIGTERM ends the process with that signal."""
    log = tmp_path / "logs" / "stops.rank_0.log"

    def stop(ended: object) -> dict[int, signal.Signals]:
        return {0: signal.SIGTERM} if log.exists() and log.stat().st_size else {}

    (outcome,) = supervisor.run(Job("stops", work=hang), stop)
    assert outcome.status == -signal.SIGTERM


def test_a_rank_that_was_quicker_keeps_its_status():
    """Invariant: a process that failed by itself before it was killed is not told as killed."""
    assert _told(Outcome(1, tail="own"), "killed") == Outcome(1, tail="own")
    assert _told(Outcome(-9), "killed") == Outcome(None, tail="killed")
    assert _told(Outcome(-9), None) == Outcome(-9)


def test_another_rank_obeys(tmp_path):
    """Invariant: an order is done by the rank that is not the first, and its answer is the process's."""
    store = dist.HashStore()
    other = Supervisor(World(rank=1, local_rank=1, size=2, device=ALONE.device, local_size=2), store, logs=tmp_path)
    first = Supervisor(World(rank=0, local_rank=0, size=2, device=ALONE.device, local_size=2), store, logs=tmp_path)
    assert first.leads
    assert not other.leads
    assert len(first.hosts()) == 2
    order = first._give(Job("gives", work=partial(give, value=3), apart=True))
    first._give(4)
    assert other.serve() == 4
    assert first._answers(order, [1])[1].value[0] == 3


def test_a_rank_that_is_silent_is_lost(tmp_path, monkeypatch):
    """Invariant: one that never comes is named when it has been silent long enough."""
    monkeypatch.setattr("nanogpt.acceptance.supervisor.SILENT_S", 0.5)
    world = World(rank=0, local_rank=0, size=2, device=ALONE.device, local_size=2)
    first = Supervisor(world, dist.HashStore(), logs=tmp_path)
    with pytest.raises(RanksLost) as lost:
        first.hosts()
    assert lost.value.ranks == (1,)
    with pytest.raises(RanksLost) as lost:
        first.run(Job("hangs", work=hang, apart=True))
    assert lost.value.ranks == (1,)


@pytest.mark.parametrize(
    ("statuses", "ranks"),
    [
        ((0, -9, 1, 1), [1]),  # its peers failed because of it
        ((None, 1, None), [1]),
        ((1, 1, 1, 0), []),  # who was the first?
        ((1,), [0]),
        ((None, None), []),
        ((3, 3, 1), [2]),
    ],
)
def test_who_is_to_blame(statuses, ranks):
    """Invariant: signals before statuses, and nobody where most have failed."""
    assert to_blame(statuses, fine=(0, 3)) == ranks
