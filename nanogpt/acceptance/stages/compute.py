"""Does every rank compute rightly, and as fast as its like? Products of random matrices, back to back, and copies.

    ranks = measure_compute(world, seconds=30)      # of one rank, which may be in a world of its own
    for check in judge_compute(ranks):
        print(check.verdict, check.name, check.found)   # PASS bf16 products, speed: 612 to 640 TFLOP/s, median 633

Random numbers, because a GPU draws more power over them than over zeros or small whole numbers, and is slower.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import gethostname
from statistics import fmean, median, median_high

import torch
from torch import Tensor

from nanogpt.acceptance.verdict import SLOW, Check, PerRank
from nanogpt.distributed.hardware import Stopwatch, free_bytes, table_peak
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import key
from nanogpt.utils.format import counted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}  # to compare with: NaN is not equal to itself
# Of the matrices, to be bound by arithmetic. A CPU without instructions for bf16 takes 0.3 s at 512, 2 s at 1024.
SIZES = {"cuda": 8192, "cpu": 512, "mps": 2048}
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**28, "mps": 2**28}  # more than most caches hold
PINNED_BYTES = 2**28
LEAST_TIMES = 3  # that something is repeated
ROUND_S, ROUND_TIMES = 0.1, 64  # after which the host waits for the device
SAMPLED_ROWS = 128  # of the first product: two at least of each tile of 128 rows, as GPUs divide it
# Rounding errors of an fp32 sum of `size` products of standard normal numbers, added one by one, have a standard
# deviation of 2**-24 * size / sqrt(6). Where a tensor core cuts digits off instead, every 8 products, they add up to
# 2 * 2/3 * (size / 8)**1.5 * sqrt(8) * 2**-24, at 8192 that is 15 * 2**-24 * size, and some times it in large sums.
SLACK = 128
THROTTLED = 0.8  # of the first tenth's speed, below which the last tenth's is a device that slowed down
# The best shapes reach 73 to 87 % of the data sheet's bf16 on A100 to GB200 (S. Bekman, Machine Learning Engineering,
# "Maximum Achievable Matmul FLOPS comparison table"); one square shape of random numbers, at the power cap, less, and a
# card with a low cap less again. So half of the least of them: what is below has a fault.
SHARE_OF_PEAK = 0.36


@dataclass(frozen=True, kw_only=True)
class Products:
    """Matrix products of one dtype on one rank. A speed is of many together: who stalls now and then is slow."""

    count: int = key("products that were compared with the first")
    wrong: int = key("products of them that were not, bit for bit, the first")
    first_error: float | None = key(
        "largest difference of the first from the host's in fp64, in parts of what rounding may explain: above 1 it is "
        "wrong; null where it is not finite, which is wrong too"
    )
    tflops: float = key("speed, TFLOP/s")
    first_tflops: float = key("speed of the first tenth of the products, TFLOP/s")
    last_tflops: float = key("speed of the last tenth of the products, TFLOP/s")


@dataclass(frozen=True, kw_only=True)
class RankCompute:
    """What one rank's device did, while all others worked too."""

    host: str = key("name of the machine")
    device: str = key("what the hardware calls itself")
    kind: str = key("cuda, mps or cpu")
    size: int = key("rows and columns of the matrices")
    fp32: Products = key("products of fp32 matrices, not in TF32")
    bf16: Products = key("products of bf16 matrices")
    copy_gbps: float = key("copy within the device's memory, bytes read and written, GB/s")
    to_device_gbps: float | None = key(
        "copy from pinned host memory to a GPU, GB/s; null: no GPU, or nothing was pinned"
    )
    from_device_gbps: float | None = key("the same back, GB/s")

    def products(self, dtype: str) -> Products:
        """Those of 'fp32' or 'bf16'."""
        return self.fp32 if dtype == "fp32" else self.bf16


def measure_compute(world: World, *, seconds: float) -> tuple[RankCompute, ...]:
    """Figures of every rank of world, the same on every rank.

    seconds: of measuring, a third each for fp32, bf16 and the copies; making the matrices and the reference comes on
    top, and so does a product that takes longer.
    """
    size = SIZES[world.device.type]
    while size > 128 and 20 * size**2 > _room_bytes(world):  # four matrices of fp32 and a comparison
        size //= 2
    size = -int(world.max(-size)[0])  # the same everywhere, to be comparable
    fp32, bf16 = (_products(world, size, dtype, seconds / 3) for dtype in DTYPES)
    copy, to_device, from_device = _copies(world, seconds / 3)
    mine = RankCompute(
        host=gethostname(), device=world.device_name(), kind=world.device.type, size=size, fp32=fp32, bf16=bf16,
        copy_gbps=copy, to_device_gbps=to_device, from_device_gbps=from_device,
    )  # fmt: skip
    return tuple(world.gather(mine))


def judge_compute(ranks: Sequence[RankCompute]) -> list[Check]:
    """What the figures say: results, then speeds."""
    checks = []
    for dtype in DTYPES:
        products = [rank.products(dtype) for rank in ranks]
        name = f"{dtype} products"
        checks += _results(name, products)
        checks.append(_like(f"{name}, speed", ranks, [p.tflops for p in products], "TFLOP/s"))
        checks.append(_throttling(f"{name}, throttling", ranks, products))
        checks.append(_data_sheet(f"{name}, data sheet", dtype, ranks, products))
    checks.append(_like("memory copy", ranks, [rank.copy_gbps for rank in ranks], "GB/s"))
    if any(rank.kind == "cuda" for rank in ranks):
        checks.append(_like("host to device", ranks, [rank.to_device_gbps for rank in ranks], "GB/s"))
        checks.append(_like("device to host", ranks, [rank.from_device_gbps for rank in ranks], "GB/s"))
    return checks


def compute_by_rank(ranks: Sequence[RankCompute]) -> list[PerRank]:
    """The speeds, for the heat map; none that no rank has."""
    figures: dict[str, list[float | None]] = {
        **{f"{dtype} products, TFLOP/s": [rank.products(dtype).tflops for rank in ranks] for dtype in DTYPES},
        "memory copy, GB/s": [rank.copy_gbps for rank in ranks],
        "host to device, GB/s": [rank.to_device_gbps for rank in ranks],
        "device to host, GB/s": [rank.from_device_gbps for rank in ranks],
    }
    known = {name: tuple(values) for name, values in figures.items() if any(value is not None for value in values)}
    return [PerRank(name=name, values=values) for name, values in known.items()]


def _results(name: str, products: Sequence[Products]) -> list[Check]:
    wrong, count = sum(p.wrong for p in products), sum(p.count for p in products)
    errors = [math.inf if p.first_error is None else p.first_error for p in products]
    repeated = Check.of(
        [i for i, p in enumerate(products) if p.wrong],
        name=f"{name}, repeated",
        found=f"{wrong:,} of {counted(count, 'product')} differ from the rank's first",
        expected="every result the first, bit for bit",
    )
    first = Check.of(
        [i for i, error in enumerate(errors) if error > 1],
        name=f"{name}, first",
        found=f"differs from the host's in fp64 by at most {max(errors):.2g} of what rounding may explain",
        expected="at most 1",
    )
    return [repeated, first]


def _like(name: str, ranks: Sequence[RankCompute], values: Sequence[float | None], unit: str) -> Check:
    """Each rank's value against the median of the ranks with its device."""
    blamed, told, missing = [], [], []
    devices = list(dict.fromkeys(rank.device for rank in ranks))
    for device in devices:
        own = {i: value for i, value in enumerate(values) if value is not None and ranks[i].device == device}
        if own:
            blamed += [i for i, value in own.items() if value < SLOW * median_high(own.values())]  # of two the faster
            told.append(_span(list(own.values()), unit) + (f" ({device})" if len(devices) > 1 else ""))
        if len(own) == 1:
            missing.append("one rank: no other to compare with" if len(ranks) == 1 else f"only one {device}")
    if lacking := values.count(None):
        missing.append(f"not measured on {counted(lacking, 'rank')}")
    if missing and not blamed:
        return Check.unknown(name, "; ".join(told + missing))
    expected = f"{SLOW:.0%} of the median of the ranks with the same device"
    return Check.of(sorted(blamed), name=name, found="; ".join(told), expected=expected)


def _throttling(name: str, ranks: Sequence[RankCompute], products: Sequence[Products]) -> Check:
    shares = [p.last_tflops / p.first_tflops for p in products]
    found = f"last tenth {_range(shares, '.0%')} of the first"
    if any(rank.kind != "cuda" for rank in ranks):
        return Check.unknown(name, f"{found}; cores that other programs use too need not be steady")
    if min(p.count for p in products) < 10:
        return Check.unknown(name, f"{found}; fewer than 10 products have no tenth")
    blamed = [i for i, share in enumerate(shares) if share < THROTTLED]
    return Check.of(blamed, name=name, found=found, expected=f"{THROTTLED:.0%} of the first")


def _data_sheet(name: str, dtype: str, ranks: Sequence[RankCompute], products: Sequence[Products]) -> Check:
    peaks = [table_peak(rank.device, dtype) for rank in ranks]
    shares = {i: p.tflops * 1e12 / peak for i, (p, peak) in enumerate(zip(products, peaks, strict=True)) if peak}
    unknown = dict.fromkeys(rank.device for rank, peak in zip(ranks, peaks, strict=True) if not peak)
    blamed = [i for i, share in shares.items() if share < SHARE_OF_PEAK]
    told = [f"{_range(list(shares.values()), '.0%')} of the data sheet's"] if shares else []
    found = "; ".join(told + [f"none is known for {device}" for device in unknown])
    if unknown and not blamed:
        return Check.unknown(name, found)
    return Check.of(blamed, name=name, found=found, expected=f"{SHARE_OF_PEAK:.0%} of the data sheet's")


def _span(values: Sequence[float], unit: str) -> str:
    """'612 to 640 TFLOP/s, median 633'."""
    return f"{_range(values, '')} {unit}" + (f", median {_figure(median(values))}" if len(values) > 1 else "")


def _range(values: Sequence[float], style: str) -> str:
    low, high = (format(each, style) if style else _figure(each) for each in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _room_bytes(world: World) -> float:
    """What one rank may take of the memory of its device: half of its share of what is free."""
    if (free := free_bytes(world)) is None:
        return math.inf
    return free / (2 if world.device.type == "cuda" else 2 * world.local_size)


def _products(world: World, size: int, dtype: str, seconds: float) -> Products:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    left, right = a.to(world.device), b.to(world.device)
    product = torch.empty_like(left)
    _multiply(left, right, product)
    first = product.clone()
    error = _error(a, b, first.cpu())
    wrong = torch.zeros((), dtype=torch.int64, device=world.device)

    def compare() -> None:
        """On the device, a few percent of a product's time; the host does not wait for it."""
        wrong.add_((product.view(BITS[product.dtype]) != first.view(BITS[product.dtype])).any())

    times = _times(world, lambda: _multiply(left, right, product), seconds, then=compare)
    tenth = max(1, len(times) // 10)
    speeds = [2 * size**3 / fmean(each) / 1e12 for each in (times, times[:tenth], times[-tenth:])]
    return Products(
        count=len(times), wrong=int(wrong), first_error=error,
        tflops=speeds[0], first_tflops=speeds[1], last_tflops=speeds[2],
    )  # fmt: skip


def _multiply(left: Tensor, right: Tensor, product: Tensor) -> None:
    torch.mm(left, right, out=product)


def _error(left: Tensor, right: Tensor, product: Tensor) -> float | None:
    """The product's largest difference from that in fp64, in parts of what rounding may explain; None: not finite.

    left, right, product: (size, size), on the host; of standard normal numbers, so that a sum is about sqrt(size).
    """
    size = len(left)
    rows = slice(None, None, max(1, size // SAMPLED_ROWS))
    exact = left[rows].double() @ right.double()
    # The result is rounded to its dtype, and in bf16 the sum of a part of the products may be too.
    allowed = torch.finfo(product.dtype).eps * (exact.abs() + size**0.5) + SLACK * 2**-24 * size
    worst = float(((product[rows].double() - exact).abs() / allowed).max())
    return worst if math.isfinite(worst) else None


def _copies(world: World, seconds: float) -> tuple[float, float | None, float | None]:
    """GB/s within the device's memory, from the host's and back."""
    device, count = world.device, COPIED_BYTES[world.device.type]
    while count > 2**20 and 4 * count > _room_bytes(world):
        count //= 2
    source, target = (torch.ones(count // 4, device=device) for _ in range(2))  # zeros may all be one page of a CPU's
    each_s = seconds / 3 if device.type == "cuda" else seconds
    copy = 2 * source.nbytes / median(_times(world, lambda: target.copy_(source), each_s)) / 1e9
    if device.type != "cuda":
        return copy, None, None
    on_device = source[: PINNED_BYTES // 4]
    on_host, pinned = _on_host(len(on_device))
    to_device = _times(world, lambda: on_device.copy_(on_host, non_blocking=True), each_s)
    from_device = _times(world, lambda: on_host.copy_(on_device, non_blocking=True), each_s)
    if not pinned:  # measured all the same, as the others wait for this rank
        return copy, None, None
    return copy, on_host.nbytes / median(to_device) / 1e9, on_host.nbytes / median(from_device) / 1e9


def _on_host(count: int) -> tuple[Tensor, bool]:
    """(count fp32 numbers, whether they are in pinned memory, which the system may refuse)."""
    try:
        return torch.ones(count, pin_memory=True), True
    except RuntimeError:
        return torch.ones(count), False


def _times(
    world: World, work: Callable[[], object], seconds: float, then: Callable[[], object] = lambda: None
) -> list[float]:
    """How long work takes on the device each time, for `seconds`, all ranks at once; then: done after each, untimed."""
    times: list[float] = []
    world.max(0.0)  # all begin together
    until = time.perf_counter() + seconds
    while len(times) < LEAST_TIMES or time.perf_counter() < until:
        # The host waits for the device rarely, but it has to look at the clock.
        in_a_round = min(ROUND_TIMES, 1 + int(ROUND_S / times[-1])) if times else 1
        watches = [Stopwatch(world.device) for _ in range(in_a_round)]
        for watch in watches:
            with watch:
                work()
                if world.device.type == "mps":
                    torch.mps.synchronize()  # the watch reads the host's clock there
            then()
        world.wait_for_device()
        times += [watch.seconds() for watch in watches]
    return times
