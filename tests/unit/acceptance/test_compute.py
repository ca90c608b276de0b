"""The compute stage finds a wrong product and names the rank that is slow."""

import json
import os
from dataclasses import replace

import pytest
import torch

from harness.runs import ALONE, free_port
from nanogpt.acceptance.stages import compute
from nanogpt.acceptance.stages.compute import Products, RankCompute, compute_by_rank, judge_compute, measure_compute
from nanogpt.acceptance.verdict import Verdict
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import from_json, parse_json, to_json

FP32 = Products(count=500, wrong=0, first_error=0.01, tflops=50.0, first_tflops=51.0, last_tflops=50.0)
BF16 = Products(count=5000, wrong=0, first_error=0.3, tflops=633.0, first_tflops=640.0, last_tflops=620.0)
RANK = RankCompute(
    host="node1", device="NVIDIA H100 80GB HBM3", kind="cuda", size=8192, fp32=FP32, bf16=BF16, copy_gbps=2800.0,
    to_device_gbps=55.0, from_device_gbps=54.0,
)  # fmt: skip
WELL = (RANK, RANK, RANK, RANK)
CPU = replace(RANK, device="cpu", kind="cpu", to_device_gbps=None, from_device_gbps=None)


def judged(*ranks):
    """Each check by its name."""
    return {check.name: check for check in judge_compute(ranks)}


def with_last(**changes):
    """Four ranks, of which the last's bf16 products, or it itself, are changed."""
    of_products = {name: value for name, value in changes.items() if hasattr(BF16, name)}
    others = {name: value for name, value in changes.items() if name not in of_products}
    return (*WELL[:3], replace(RANK, **others, bf16=replace(BF16, **of_products)))


def test_healthy_ranks_pass():
    """Invariant: ranks that are alike, right and near their data sheet pass, with their figures."""
    checks = judged(*WELL[:3], replace(RANK, bf16=replace(BF16, tflops=612.0)))
    assert {check.verdict for check in checks.values()} == {Verdict.PASS}
    assert checks["bf16 products, speed"].found == "612 to 633 TFLOP/s, median 633"
    assert checks["bf16 products, data sheet"].found == "62% to 64% of the data sheet's"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"wrong": 1}, ["bf16 products, repeated"]),
        ({"first_error": 1.5}, ["bf16 products, first"]),
        ({"first_error": None}, ["bf16 products, first"]),
        ({"tflops": 430.0}, ["bf16 products, speed"]),
        ({"tflops": 330.0}, ["bf16 products, speed", "bf16 products, data sheet"]),
        ({"last_tflops": 500.0}, ["bf16 products, throttling"]),
        ({"copy_gbps": 1000.0}, ["memory copy"]),
        ({"to_device_gbps": 12.0}, ["host to device"]),
        ({"from_device_gbps": 12.0}, ["device to host"]),
    ],
)
def test_each_fault_is_named(changes, names):
    """Invariant: the checks that it concerns fail and name the rank; all others pass."""
    checks = judged(*with_last(**changes)).values()
    assert [(check.name, check.ranks) for check in checks if check.verdict is Verdict.FAIL] == [
        (name, (3,)) for name in names
    ]
    assert {check.verdict for check in checks} == {Verdict.PASS, Verdict.FAIL}


def test_what_cannot_be_held_to_anything_is_unknown():
    """Invariant: one rank has no like, a CPU neither a data sheet nor cores of its own; results are judged."""
    alone = judged(RANK)
    speeds = ["fp32 products, speed", "bf16 products, speed", "memory copy", "host to device", "device to host"]
    assert [name for name, check in alone.items() if check.verdict is Verdict.UNKNOWN] == speeds
    assert alone["memory copy"].found == "2,800 GB/s; one rank: no other to compare with"
    cpus = judged(CPU, CPU)
    assert {name.split(", ")[-1] for name, check in cpus.items() if check.verdict is Verdict.UNKNOWN} == {
        "throttling", "data sheet",
    }  # fmt: skip
    assert "host to device" not in cpus
    not_pinned = judged(*with_last(to_device_gbps=None))["host to device"]
    assert (not_pinned.verdict, not_pinned.found) == (
        Verdict.UNKNOWN, "55 GB/s, median 55; not measured on 1 rank",
    )  # fmt: skip


def test_unlike_devices_are_not_compared():
    """Invariant: a slower device is not a slow one; where it has no like, that is said."""
    slower = replace(RANK, device="L4", fp32=replace(FP32, tflops=13.0), bf16=replace(BF16, tflops=60.0))
    assert judged(*WELL, slower, slower)["bf16 products, speed"].verdict is Verdict.PASS
    check = judged(*WELL, slower)["bf16 products, speed"]
    assert check.verdict is Verdict.UNKNOWN
    assert check.found == "633 TFLOP/s, median 633 (NVIDIA H100 80GB HBM3); 60 TFLOP/s (L4); only one L4"


def test_the_heat_map_has_what_was_measured():
    """Invariant: a speed that no rank has is none of its figures; one that a rank lacks is None there."""
    assert [figure.name for figure in compute_by_rank([CPU])] == [
        "fp32 products, TFLOP/s", "bf16 products, TFLOP/s", "memory copy, GB/s",
    ]  # fmt: skip
    assert compute_by_rank(with_last(to_device_gbps=None))[3].values == (55.0, 55.0, 55.0, None)


@pytest.fixture
def small(monkeypatch):
    """Matrices and buffers of which a test can afford several."""
    monkeypatch.setitem(compute.SIZES, "cpu", 128)
    monkeypatch.setitem(compute.COPIED_BYTES, "cpu", 2**20)


@pytest.mark.usefixtures("small")
def test_a_rank_measures_itself():
    """Invariant: every result is right, at least three of each are made, and the figures are read back from JSON."""
    (mine,) = measure_compute(ALONE, seconds=0.3)
    for products in (mine.fp32, mine.bf16):
        assert products.wrong == 0 < products.first_error < 1
        assert products.count >= compute.LEAST_TIMES
        assert min(products.tflops, products.first_tflops, products.last_tflops) > 0
    assert (mine.kind, mine.size, mine.to_device_gbps) == ("cpu", 128, None)
    assert from_json(RankCompute, parse_json(json.dumps(to_json(mine)))) == mine


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_flipped_bit_is_found(dtype, monkeypatch):
    """Reference: one product of many, in which the lowest bit of one number is another."""
    right, made = compute._multiply, []

    def flip(left, others, product):
        right(left, others, product)
        made.append(product.dtype)
        if made.count(compute.DTYPES[dtype]) == 3 and product.dtype == compute.DTYPES[dtype]:
            product.view(compute.BITS[product.dtype])[5, 7] ^= 1

    monkeypatch.setattr(compute, "_multiply", flip)
    (mine,) = measure_compute(ALONE, seconds=0)
    assert {name: mine.products(name).wrong for name in compute.DTYPES} == {"fp32": 0, "bf16": 0} | {dtype: 1}


@pytest.mark.usefixtures("small")
def test_a_device_that_is_always_wrong_is_found(monkeypatch):
    """Reference: inputs without the 13 bits that TF32 leaves out: every result equals the first, and all are wrong."""
    right = compute._multiply

    def multiply(left, others, product):
        if left.dtype == torch.float32:
            left, others = ((m.view(torch.int32) & ~0x1FFF).view(torch.float32) for m in (left, others))
        right(left, others, product)

    monkeypatch.setattr(compute, "_multiply", multiply)
    (mine,) = measure_compute(ALONE, seconds=0)
    assert (mine.fp32.wrong, mine.bf16.wrong) == (0, 0)
    assert mine.bf16.first_error < 1 < mine.fp32.first_error


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [32, 256, 1024])
def test_rounding_alone_stays_far_below_the_limit(dtype, size):
    """Invariant: a right product is within half of what is allowed, at any size; a sign that is not is far above."""
    a, b = (torch.randn(size, size, dtype=compute.DTYPES[dtype]) for _ in range(2))
    product = (a.float() @ b.float()).to(a.dtype)
    assert compute._error(a, b, product) < 0.5
    product[0, product[0].abs().argmax()] *= -1
    assert compute._error(a, b, product) > 10
    product[0, 0] = float("nan")
    assert compute._error(a, b, product) is None


def _measure(rank, port, answers):
    """One rank of two, the second of which would take smaller matrices."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    compute.COPIED_BYTES["cpu"], compute.SIZES["cpu"] = 2**20, 256 >> rank
    world = World(rank=rank, local_rank=rank, size=2, local_size=2, device=torch.device("cpu"))
    with world.process_group():
        answers.put(measure_compute(world, seconds=0.1))


def test_ranks_measure_together():
    """Invariant: every rank has the figures of all, of matrices of one size, the smallest that a rank would take."""
    context = torch.multiprocessing.get_context("fork")
    port, answers = free_port(), context.Queue()
    ranks = [context.Process(target=_measure, args=(rank, port, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    first, second = (answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    assert first == second
    assert [rank.size for rank in first] == [128, 128]
    assert {check.verdict for check in judge_compute(first)[:2]} == {Verdict.PASS}
