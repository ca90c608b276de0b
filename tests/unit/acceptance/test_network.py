"""The network stage finds what is slow or wrong, and says nothing of what it has not measured."""

import json
import os
import time
from dataclasses import replace
from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch

from harness.runs import ALONE, free_port
from nanogpt.acceptance.expected import ExpectedMachine, ExpectedNetwork, read_expected
from nanogpt.acceptance.stages import collectives, links
from nanogpt.acceptance.stages.collectives import SIZES, CollectiveFigure, groups_of
from nanogpt.acceptance.stages.links import Finding, bisect, bus_gbps, find_slow, replay, units_of
from nanogpt.acceptance.stages.network import NetworkFigures, judge_network, measure_network, network_by_rank
from nanogpt.acceptance.verdict import Verdict
from nanogpt.config.errors import ConfigError
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import from_json, to_json

SECONDS = 3.0  # of a measurement here; it says itself what it had no time for
SEARCH_S = 5.0  # of a search
SLOWED = 9  # times as long as a collective took a slowed rank rests after it: what else is at work slows all alike


# The search, on networks that are told to it


def searched(count, slow_units=(), slow_links=()):
    """What is found among count units, where a ring has the bandwidth of its slowest unit or link."""
    units = tuple((rank,) for rank in range(count))

    def gbps(members):
        ranks = sorted(rank for (rank,) in members)
        ring = [frozenset(pair) for pair in pairwise([*ranks, ranks[0]])]
        return 20.0 if set(ranks) & set(slow_units) or set(ring) & set(slow_links) else 100.0

    search = find_slow(units)
    try:
        sets = next(search)
        while True:
            assert len({len(each) for each in sets}) == 1, "only sets of one size are compared"
            assert sum(map(len, sets)) == len(set().union(*sets)), "sets that are measured together share no rank"
            sets = search.send([gbps(each) for each in sets])
    except StopIteration as end:
        return end.value


@pytest.mark.parametrize("count", range(2, 18))
def test_a_sound_network_has_no_finding(count):
    """Invariant: where all are alike nothing is named, of odd counts too."""
    assert searched(count) is None


@pytest.mark.parametrize("count", range(3, 18))
def test_a_slow_unit_is_found_wherever_it_is(count):
    """Invariant: the one slow unit is named, and no other."""
    for slow in range(count):
        assert searched(count, slow_units=[slow]) == Finding(((slow,),))


@pytest.mark.parametrize("count", [3, 4])
def test_a_slow_link_is_found(count):
    """Invariant: each link among three or four units is named by its two ends."""
    for link in combinations(range(count), 2):
        found = searched(count, slow_links=[frozenset(link)])
        assert {rank for unit in found.units + found.other for rank in unit} == set(link)
        assert len(found.other) == 1


def test_slow_links_between_the_halves_are_found():
    """Invariant: where halves are sound and all that leads from one to the other is slow, that is named."""
    between = [frozenset((a, b)) for a in range(4) for b in range(4, 8)]
    found = searched(8, slow_links=between)
    assert {found.units, found.other} == {((0,), (1,), (2,), (3,)), ((4,), (5,), (6,), (7,))}


def test_two_have_no_like():
    """Invariant: of two units, of which both are slow or none, nothing is asked and nothing found."""
    assert searched(2, slow_units=[0]) is searched(2, slow_links=[frozenset((0, 1))]) is None


# Real process groups


def _work(world, hosts, wrong_rank):
    if world.rank == wrong_rank:
        gather = collectives.all_gather

        def wrong(values, share, group):
            gather(values, share, group=group)
            values[-1] += 1

        collectives.all_gather = wrong
    return measure_network(world, seconds=SECONDS, hosts=hosts)


def _search(world, hosts, slow_rank):
    if world.rank == slow_rank:
        all_reduce = links.dist.all_reduce

        def slow(values, group):
            began = time.perf_counter()
            all_reduce(values, group=group)
            time.sleep(SLOWED * (time.perf_counter() - began))

        links.dist = SimpleNamespace(**{**vars(links.dist), "all_reduce": slow})
    return bisect(world, units_of(hosts), seconds=SEARCH_S)


def _rank(rank, port, hosts, answers, work, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = World(rank=rank, local_rank=rank, size=len(hosts), device=torch.device("cpu"), local_size=len(hosts))
    with world.process_group():
        answers.put((rank, work(world, hosts, *arguments)))


def in_ranks(work, hosts, *arguments):
    """What work(world, hosts, *arguments) returns on each of the ranks of pretended hosts: the same."""
    context = torch.multiprocessing.get_context("fork")  # they need not import torch again
    port, answers = free_port(), context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, port, hosts, answers, work, arguments)) for rank in range(len(hosts))
    ]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert len(found) == len(hosts)
    assert all(each == found[0] for each in found.values())
    return found[0]


def measured(*hosts, wrong_rank=None):
    """The figures of a real measurement."""
    return in_ranks(_work, hosts, wrong_rank)


def checks_of(figures, expected=None):
    """By their names; the same from what a file of the figures holds."""
    checks = judge_network(figures, expected)
    assert judge_network(from_json(NetworkFigures, to_json(figures)), expected) == checks
    return {check.name: check for check in checks}


@pytest.mark.parametrize(
    ("hosts", "groups"),
    [
        ("aa", {"within": [2]}),
        ("abc", {"across": [3]}),
        ("aabb", {"within": [2, 2], "across": [2], "all": [4]}),
        ("aab", {"within": [2], "across": [2], "all": [3]}),
    ],
)
def test_every_group_is_measured_and_right(hosts, groups):
    """Invariant: each collective, in each group, at the smallest size at least; its sums exact, its time positive."""
    figures = measured(*hosts)
    assert {kind: [len(ranks) for ranks in sets] for kind, sets in groups_of(hosts).items()} == groups
    smallest = [f for f in figures.collectives if f.bytes < 2 * SIZES[0]]
    assert sorted((f.group, f.ranks) for f in smallest) == sorted(
        (kind, size) for kind, sizes in groups.items() for size in sizes * len(collectives.COLLECTIVES)
    )
    for f in figures.collectives:
        assert 0 < f.best_s <= f.median_s
        assert f.bus_gbps == bus_gbps(f.collective, f.ranks, f.bytes, f.median_s)
        assert f.bytes % (32 * f.ranks) == 0
    reached = {(f.group, f.collective) for f in figures.collectives if f.bytes >= SIZES[-1]}
    assert len(figures.left_out) == len(groups) * len(collectives.COLLECTIVES) - len(reached)
    checks = checks_of(figures)
    assert checks["collectives are exact"].verdict is Verdict.PASS
    assert all(len(shown.values) == len(hosts) for shown in network_by_rank(figures))
    replay(units_of(hosts), figures.bisect)
    if len(set(hosts)) == 2 or len(hosts) == 2:
        assert checks["slow node or link by halving"].verdict is Verdict.UNKNOWN


def test_a_wrong_result_names_who_saw_it():
    """Invariant: a rank that receives one wrong value fails the check by its number; other collectives are right."""
    figures = measured("a", "a", wrong_rank=1)
    assert {f.wrong_ranks for f in figures.collectives if f.collective == "all_gather"} == {(1,)}
    assert {f.wrong_ranks for f in figures.collectives if f.collective != "all_gather"} == {()}
    check = checks_of(figures)["collectives are exact"]
    assert (check.verdict, check.ranks) == (Verdict.FAIL, (1,))


def test_a_slowed_rank_is_found():
    """Reference: of three ranks the one that rests after each collective; tests/slurm slows a whole node."""
    assert replay(units_of("aaa"), in_ranks(_search, "aaa", 1)) == Finding(((1,),))


def test_memory_limits_the_size(monkeypatch):
    """Invariant: the largest message fits four times into a rank's memory, of a CPU's into its share."""
    monkeypatch.setattr(collectives, "free_bytes", lambda _: 16_000)
    assert collectives.most_bytes(replace(ALONE, local_size=1)) == 4_000
    assert collectives.most_bytes(replace(ALONE, local_size=4)) == 1_000
    monkeypatch.setattr(collectives, "free_bytes", lambda _: None)
    assert collectives.most_bytes(ALONE) == SIZES[-1]


# Verdicts


def figure(host="a", **values):
    """An all_reduce of eight ranks within a node at 1 GB."""
    values = {"bytes": 10**9, "median_s": 1e-2, "collective": "all_reduce"} | values
    gbps = bus_gbps(values["collective"], 8, values["bytes"], values["median_s"])
    fixed = {"group": "within", "ranks": 8, "repetitions": 5, "best_s": values["median_s"], "wrong_ranks": ()}
    return CollectiveFigure(host=host, bus_gbps=gbps, **fixed | values)


def figures_of(*collective_figures, hosts=("a",) * 8, **more):
    """Figures whose links are alike, and whose search found nothing."""
    received = more.pop("receive_gbps", (100.0,) * len(hosts))
    return NetworkFigures(
        hosts=hosts, devices=("NVIDIA H100 80GB HBM3",) * len(hosts), collectives=collective_figures, left_out=(),
        receive_gbps=received, bisect=(), seconds=1.0, **more,
    )  # fmt: skip


def test_one_rank_has_no_network():
    """Invariant: nothing passes where there is nothing to measure."""
    figures = measure_network(ALONE, seconds=1.0, hosts=["a"])
    assert {check.verdict for check in judge_network(figures, read_expected(None))} == {Verdict.UNKNOWN}
    assert network_by_rank(figures) == []


def test_bus_bandwidth():
    """Reference: the factors of nccl-tests' doc/PERFORMANCE.md for eight ranks, 1 GB in 10 ms."""
    assert bus_gbps("all_reduce", 8, 10**9, 0.01) == pytest.approx(100 * 2 * 7 / 8)
    assert bus_gbps("reduce_scatter", 8, 10**9, 0.01) == bus_gbps("all_gather", 8, 10**9, 0.01)
    assert bus_gbps("all_gather", 8, 10**9, 0.01) == pytest.approx(100 * 7 / 8)


def test_a_slow_link_is_named_and_who_is_at_both_is_blamed():
    """Invariant: one slow link is named and fails, and blames nobody; two at one rank blame that rank."""
    one = checks_of(figures_of(receive_gbps=(100.0,) * 5 + (60.0,) + (100.0,) * 2))["links within nodes"]
    assert (one.verdict, one.ranks) == (Verdict.FAIL, ())
    assert "rank 4 to 5 on a: 60 GB/s" in one.found
    two = checks_of(figures_of(receive_gbps=(100.0,) * 5 + (60.0,) * 2 + (100.0,)))["links within nodes"]
    assert (two.verdict, two.ranks) == (Verdict.FAIL, (5,))


def test_a_record_that_no_search_has_left_is_no_pass():
    """Invariant: steps that are missing or of other ranks give UNKNOWN."""
    check = checks_of(figures_of())["slow node or link by halving"]
    assert check.verdict is Verdict.UNKNOWN


def test_a_node_that_is_slow_within_itself():
    """Invariant: it is named when it is slow in all three collectives, not in two; small messages do not tell."""
    hosts = tuple("a" * 8 + "b" * 8 + "c" * 8)

    def node_check(slow, size=10**9):
        seen = [
            figure(host, collective=name, bytes=size, median_s=2e-2 if host == "b" and name in slow else 1e-2)
            for host in "abc"
            for name in collectives.COLLECTIVES
        ]
        return checks_of(figures_of(*seen, hosts=hosts))["nodes against each other"]

    assert node_check(collectives.COLLECTIVES).ranks == tuple(range(8, 16))
    assert node_check(collectives.COLLECTIVES[:2]).verdict is Verdict.PASS
    assert node_check(collectives.COLLECTIVES, size=32_000).verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("given", "least", "verdict"),
    [
        ({}, 175.0, Verdict.PASS),  # 1 GB in 10 ms
        ({}, 176.0, Verdict.FAIL),
        ({"bytes": 32 * 10**6, "median_s": 1e-2}, 176.0, Verdict.UNKNOWN),  # a larger message might be faster
        ({}, None, Verdict.UNKNOWN),
    ],
)
def test_what_is_expected(given, least, verdict):
    """Invariant: FAIL only below the least at the largest size, UNKNOWN without a figure to hold it to."""
    machine = ExpectedMachine(
        name="ours", device="*H100*", ranks_per_node=8, within_gbps=least, across_gbps=1.0, source="a test"
    )
    check = checks_of(figures_of(figure(**given)), ExpectedNetwork(machines=(machine,)))["all_reduce within a node"]
    assert check.verdict is verdict
    assert ("ours: a test" in check.expected) == (verdict in (Verdict.PASS, Verdict.FAIL))
    assert (check.ranks == tuple(range(8))) == (verdict is Verdict.FAIL)


def test_the_first_machine_that_fits_counts():
    """Invariant: device, ranks of a node and nodes must all be as the file says."""
    eight = {"devices": ["NVIDIA H100 80GB HBM3"] * 8, "hosts": ["a"] * 8}
    known = read_expected(None)
    assert known.fitting(**eight).name == "8 H100 SXM5, NVLink"
    assert known.fitting(devices=eight["devices"], hosts=["a"] * 4 + ["b"] * 4) is None
    assert known.fitting(devices=["NVIDIA H100 PCIe"] * 8, hosts=eight["hosts"]) is None
    assert known.fitting(devices=[*eight["devices"][:7], "NVIDIA H200"], hosts=eight["hosts"]) is None
    assert all(machine.source and machine.within_gbps for machine in known.machines)


ENTRY = {"name": "ours", "device": "*", "ranks_per_node": None, "within_gbps": 100, "source": "us"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ({}, "it has no machines"),
        ({"machines": [{**ENTRY, "within_gbps": "fast"}]}, "machines[0].within_gbps is 'fast', not a number"),
        ({"machines": [{**ENTRY, "within_gbps": -1}]}, "machines[0].within_gbps is -1, not above 0"),
        ({"machines": [{**ENTRY, "within": 1}]}, "machines[0] has an unknown key within"),
        ({"machines": [{**ENTRY, "within_gbps": None}]}, "machines[0] expects nothing"),
        ({"machines": [ENTRY, {"name": "ours"}]}, "it has no machines[1].device"),
        ({"machines": [], "format_version": 9}, "format_version 9"),
    ],
)
def test_a_bad_file_is_one_line(content, said, tmp_path):
    """Invariant: ConfigError, status 2, with the file's name and what is wrong in it."""
    path = tmp_path / "expected.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as error:
        read_expected(str(path))
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_read(tmp_path):
    """Invariant: a good file is what it says; one that is not there is an error."""
    path = tmp_path / "expected.json"
    path.write_text(json.dumps({"machines": [ENTRY]}))
    assert read_expected(str(path)).machines == (ExpectedMachine(**ENTRY),)
    with pytest.raises(ConfigError, match="no such file"):
        read_expected(str(tmp_path / "none.json"))
