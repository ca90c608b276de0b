"""Before the training: does every rank compute and communicate, rightly and as fast as the others?

    findings = check_health(world, dtype="bf16", say=print)      # every rank calls; up to 10 s
    ["rank 3 on node2: matmul 41 TFLOP/s, the median is 310 TFLOP/s"]

One slow GPU or link slows every rank of a synchronous training, and a wrong one spoils it; the loss curve tells of
neither. The matrices hold small whole numbers, so that every product and sum is exact, and any difference a fault.
"""

import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from nanogpt.distributed.hardware import lacks_gpu
from nanogpt.distributed.world import World
from nanogpt.utils.format import counted

BUDGET_S = 2.0  # of each of the three measurements
MOST_TIMES = 50  # that one of them is repeated
SLOW = 0.7  # of the median, below which a rank is named
MATMUL_SIZE = {"cuda": 4096, "cpu": 1024, "mps": 2048}
BUFFER_BYTES = {"cuda": 64 * 2**20, "cpu": 2**20}


@dataclass(frozen=True)
class Health:
    """What one rank found of itself."""

    host: str
    device: str
    lacks_gpu: bool  # Slurm gave the job GPUs on this node, and this rank has none
    matmul_tflops: float
    matmul_is_exact: bool
    all_reduce_gbps: float  # GB/s that a rank sends, 0 where there is no other
    all_reduce_is_exact: bool
    receive_gbps: float  # GB/s from the rank before, 0 where there is no other


def check_health(world: World, *, dtype: str, say: Callable[[str], None]) -> list[str]:
    """Measure all ranks together -> one line for each that is wrong or slow, the same on every rank.

    say: hears of the figures on the first rank.
    """
    began = time.perf_counter()
    tflops, matmul_is_exact = _matmul(world, dtype)
    all_reduce_gbps, all_reduce_is_exact = _all_reduce(world)
    mine = Health(
        host=socket.gethostname(),
        device=world.device_name(),
        lacks_gpu=lacks_gpu(world),
        matmul_tflops=tflops,
        matmul_is_exact=matmul_is_exact,
        all_reduce_gbps=all_reduce_gbps,
        all_reduce_is_exact=all_reduce_is_exact,
        receive_gbps=receive_from_before(world),
    )
    ranks = world.gather(mine)
    if world.is_first:
        say(_summary(ranks, dtype, time.perf_counter() - began))
    return judge(ranks)


def judge(ranks: list[Health]) -> list[str]:
    """One line for each rank that is wrong, or much slower than its like."""
    usual_device = Counter(r.device for r in ranks).most_common(1)[0][0]
    usual_tflops = median(r.matmul_tflops for r in ranks)
    across = [r.host != ranks[i - 1].host for i, r in enumerate(ranks)]  # whether it receives from another node
    usual_receive = {
        kind: median(r.receive_gbps for r, other in zip(ranks, across, strict=True) if other == kind)
        for kind in set(across)
    }
    findings = []
    for i, r in enumerate(ranks):
        wrong = []
        if r.lacks_gpu:
            wrong.append(f"{r.device} although the job has GPUs on this node")
        if r.device != usual_device:
            wrong.append(f"{r.device}, most ranks have {usual_device}")
        if not r.matmul_is_exact:
            wrong.append("matmul gives wrong numbers")
        if not r.all_reduce_is_exact:
            wrong.append("all-reduce gives wrong numbers")
        if r.matmul_tflops < SLOW * usual_tflops:
            wrong.append(f"matmul {r.matmul_tflops:.3g} TFLOP/s, the median is {usual_tflops:.3g} TFLOP/s")
        if r.receive_gbps < SLOW * usual_receive[across[i]]:
            before = (i - 1) % len(ranks)
            wrong.append(
                f"{r.receive_gbps:.3g} GB/s from rank {before} on {ranks[before].host}, the median of such links is "
                f"{usual_receive[across[i]]:.3g} GB/s"
            )
        if wrong:
            findings.append(f"rank {i} on {r.host}: {'; '.join(wrong)}")
    return findings


def _summary(ranks: list[Health], dtype: str, seconds: float) -> str:
    tflops = [r.matmul_tflops for r in ranks]
    network = ""
    if len(ranks) > 1:
        slowest = min(ranks, key=lambda r: r.receive_gbps)
        network = (
            f", all-reduce {min(r.all_reduce_gbps for r in ranks):.3g} GB/s, slowest neighbour link "
            f"{slowest.receive_gbps:.3g} GB/s (to {slowest.host})"
        )
    return (
        f"health: {counted(len(ranks), 'rank')} on {counted(len({r.host for r in ranks}), 'node')}, "
        f"{dtype} matmul {min(tflops):.3g} to {max(tflops):.3g} TFLOP/s{network}; {seconds:.1f} s"
    )


def _matmul(world: World, dtype: str) -> tuple[float, bool]:
    """(TFLOP/s, whether the product is exact) of this rank's device."""
    size = MATMUL_SIZE[world.device.type]
    generator = torch.Generator().manual_seed(world.rank)
    # A quarter of the entries are 1 or -1: no sum in the product comes near 256, up to which bf16 is exact.
    a, b = (
        torch.randint(-1, 2, (size, size), generator=generator, dtype=torch.int8)
        * (torch.rand(size, size, generator=generator) < 0.375)
        for _ in range(2)
    )
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    left, right = a.to(world.device, kind), b.to(world.device, kind)
    # Freivalds: the sums of the product's rows, without another product of matrices.
    is_exact = torch.equal((left @ right).cpu().double().sum(1), a.double() @ b.double().sum(1))
    began = time.perf_counter()
    times: list[float] = []
    while len(times) < MOST_TIMES and time.perf_counter() - began < BUDGET_S:
        times.append(world.seconds_of(lambda: left @ right))
    return 2 * size**3 / median(times) / 1e12, is_exact


def _all_reduce(world: World) -> tuple[float, bool]:
    """(GB/s that this rank sends, whether the sum is exact) of an all-reduce over all ranks."""
    if world.size == 1:
        return 0.0, True
    values = torch.full((BUFFER_BYTES[world.device.type] // 4,), float(world.rank + 1), device=world.device)
    dist.all_reduce(values)  # untimed: the first one may have to connect the ranks
    is_exact = bool((values == world.size * (world.size + 1) / 2).all())
    values.zero_()  # or the sums would grow to infinity
    seconds = [world.seconds_of(lambda: dist.all_reduce(values))]
    seconds += [world.seconds_of(lambda: dist.all_reduce(values)) for _ in range(_more_times(world, seconds[0]))]
    sent = 2 * (world.size - 1) / world.size * values.nbytes  # of a ring
    return sent / median(seconds) / 1e9, is_exact


def receive_from_before(world: World) -> float:
    """GB/s from the rank before.

    Half of the ranks send while the others receive, so that a slow link slows no receiver but its own.
    """
    if world.size == 1:
        return 0.0
    buffer = torch.zeros(BUFFER_BYTES[world.device.type] // 4, device=world.device)
    before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size

    def turn(sender: int) -> int:
        """When a rank sends: every other one in turn 0 and 1, and the last of an odd number in turn 2."""
        return 2 if world.size % 2 and sender == world.size - 1 else sender % 2

    def exchange() -> float:
        seconds = 0.0
        for now in range(2 + world.size % 2):
            world.max(0.0)  # all begin together
            if turn(world.rank) == now:
                dist.send(buffer, after)
            elif turn(before) == now:
                seconds = world.seconds_of(lambda: dist.recv(buffer, before))
        return seconds

    exchange()  # connects each pair of ranks, which takes longer than the link would
    began = time.perf_counter()
    times = [exchange()]
    times += [exchange() for _ in range(_more_times(world, time.perf_counter() - began))]
    return buffer.nbytes / median(times) / 1e9


def _more_times(world: World, first_s: float) -> int:
    """How often to repeat what took first_s, the same number on every rank: as often as the slowest can."""
    return min(MOST_TIMES, int(BUDGET_S / world.max(first_s)[0]) - 1)
