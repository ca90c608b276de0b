"""Ranks that meet, or do not: who is missing is named in time. Threads are the ranks where no process must die."""

import multiprocessing
import os
import re
import signal
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from harness.runs import free_port, wait_for
from nanogpt.config.errors import ConfigError, RunError
from nanogpt.distributed import rendezvous
from nanogpt.distributed.rendezvous import meet
from nanogpt.distributed.world import World
from nanogpt.utils.signals import StopRequested


@pytest.fixture(autouse=True)
def address(monkeypatch):
    """A free port where the ranks are to meet, and short waits."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    waits = {"LINE_S": 0.5, "STOP_S": 0.5, "SILENCE_S": 2.0, "LATER_POLL_S": 0.1, "FIRST_S": 0.0, "RESOLVE_S": 0.5}
    for name, seconds in (waits | {"GRACE_S": 1.0}).items():
        monkeypatch.setattr(rendezvous, name, seconds)


def come(ranks, size, *, timeout_s=60.0, asked=None):
    """What meet() gives or raises in each of these ranks: {rank: result}, and the seconds that it took.

    asked: the rank that is asked to stop.
    """
    results = {}

    def rank_of(rank):
        try:
            results[rank] = meet(rank=rank, size=size, timeout_s=timeout_s, asked_to_stop=lambda: rank == asked)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_of, args=[rank]) for rank in ranks]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, time.monotonic() - began


def test_all_ranks_share_a_store():
    """Invariant: what one rank writes the others read."""
    stores, _ = come([0, 1, 2], 3)
    stores[1].set("key", "value")
    assert [stores[rank].get("key") for rank in range(3)] == [b"value"] * 3


def test_who_is_missing_is_named(capsys):
    """Invariant: in lines meanwhile, from the first rank alone, and in one at the end of every rank; in time."""
    ended, took_s = come([0, 1], 4, timeout_s=3)
    line = "2 of 4 ranks connected, ranks 2, 3 are missing"
    for rank in (0, 1):
        assert isinstance(ended[rank], RunError)
        assert (str(ended[rank]), ended[rank].rank) == (f"{line}: gave up after 3 s (--comm_timeout_s)", rank)
    assert 3 < took_s < 15
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 2
    assert all(re.fullmatch(rf"waiting for the other ranks for \d+ s: {line}", each) for each in said[1:]), said


def test_a_rank_that_does_not_reach_the_first_says_so(capsys):
    """Invariant: whether nobody listens, or somebody who is no store and does not answer."""
    ended, _ = come([1], 2, timeout_s=2)
    assert "rank 1 does not reach rank 0 at 127.0.0.1:" in capsys.readouterr().out
    assert "(Connection refused): gave up after 2 s" in str(ended[1])
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        ended, took_s = come([1], 2, timeout_s=2)
    assert re.search(r"rank 1 does not reach rank 0 at 127.0.0.1:\d+ \(no answer\): gave up", str(ended[1]))
    assert took_s < 15


def test_a_store_that_no_longer_answers_is_no_longer_believed():
    """Invariant: what the first rank had last said of others is not repeated once it is stopped."""
    first = multiprocessing.get_context("fork").Process(target=come, args=([0], 3))
    first.start()
    threading.Timer(2.0, lambda: os.kill(first.pid, signal.SIGSTOP)).start()
    ended, took_s = come([1], 3, timeout_s=6)
    first.kill()
    assert re.search(r"rank 1 does not reach rank 0 at 127.0.0.1:\d+ \(no answer\): gave up", str(ended[1]))
    assert took_s < 20


@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_stop_is_every_rank_s(asked):
    """Invariant: one rank is asked to stop while another is missing, and all that came leave."""
    results, took_s = come([0, 1], 3, asked=asked)
    assert [type(results[rank]) for rank in (0, 1)] == [StopRequested] * 2
    assert took_s < 15


def test_a_request_to_stop_does_not_part_ranks_that_are_all_there():
    """Invariant: they go on to where a run stops with a report."""
    results, _ = come([0, 1], 2, asked=0)
    assert all(isinstance(results[rank], dist.Store) for rank in (0, 1))


def test_a_rank_that_died_while_it_waited_is_missing(capsys):
    """Invariant: a killed process no longer counts; one that is started in its place does."""
    killed = multiprocessing.get_context("fork").Process(target=come, args=([1], 3))
    killed.start()
    results, said = {}, []

    def has_said(line):
        said.append(capsys.readouterr().out)
        return line in "".join(said)

    waiting = threading.Thread(target=lambda: results.update(come([0], 3)[0]))
    waiting.start()
    wait_for(lambda: has_said("2 of 3 ranks connected, rank 2 is missing"), seconds=30)
    killed.kill()
    wait_for(lambda: has_said("1 of 3 ranks connected, ranks 1, 2 are missing"), seconds=30)
    results.update(come([1, 2], 3)[0])
    waiting.join()
    results[0].set("key", "value")
    assert [results[rank].get("key") for rank in (1, 2)] == [b"value"] * 2


def test_a_store_that_outlives_its_ranks(monkeypatch):
    """Invariant: torchrun keeps one, with what killed ranks have left: whoever is back first waits for the others."""
    port = int(os.environ["MASTER_PORT"])
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in range(3):
        late = threading.Timer(1.0, lambda: stores.update(come([attempt % 2], 2)[0]))  # noqa: B023, it ends in its turn
        stores = {}
        late.start()
        stores.update(come([1 - attempt % 2], 2)[0])
        late.join()
        assert not stores[0].check(["address"])
        stores[0].set("address", "of this attempt")
        assert stores[1].get("address") == b"of this attempt"
    assert server.num_keys() > 3


def test_an_address_that_is_nobody_s(monkeypatch):
    """Invariant: a name that stays unknown, and a port that is taken, are the configuration's fault, and soon told."""
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        results, _ = come([0], 2)
    assert isinstance(results[0], ConfigError)
    assert re.fullmatch(r"MASTER_PORT=\d+ cannot be used: Address already in use: name another one", str(results[0]))
    for host in ("nowhere.invalid", "two..dots"):
        monkeypatch.setenv("MASTER_ADDR", host)
        results, took_s = come([0, 1], 2)
        assert all(f"MASTER_ADDR={host} cannot be resolved" in str(results[rank]) for rank in (0, 1))
        assert isinstance(results[0], ConfigError)
        assert took_s < 60  # a resolver's own time-outs


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 must be a number from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 must be a number from 1 to 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http must be a number"),
        ({}, "WORLD_SIZE=2 without LOCAL_RANK"),
    ],
)
def test_an_environment_that_is_not_torchruns(changed, line, monkeypatch):
    """Invariant: it is refused before anybody waits; with GPUs, of which each rank needs its own, LOCAL_RANK too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=line):
        World.from_env()
    monkeypatch.setenv("LOCAL_RANK", "1")
    if not changed:
        assert World.from_env().device == torch.device("cuda", 1)
