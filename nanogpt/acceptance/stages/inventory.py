"""What every rank runs on, before and after the acceptance: unlike ranks are named, and GPUs that say fault.

    before = take_inventory(world)                  # every rank calls
    ...
    checks = judge_inventory(before, take_inventory(world))
    "driver 570.86.15 on ranks 0, 1, 2; 550.54.14 on rank 3"

What a GPU says comes from NVML (nanogpt.acceptance.stages.gpu).
"""

import os
import platform
import re
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname
from typing import Any

import torch

from nanogpt.acceptance.stages.gpu import FAULTY_REASONS, Gpu, read_gpu
from nanogpt.acceptance.verdict import Check, Verdict
from nanogpt.distributed.hardware import lacks_gpu
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import key
from nanogpt.utils.format import counted

PROCESS_STATUS = Path("/proc/self/status")
NODES = Path("/sys/devices/system/node")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
# Linux lets a process lock 64 KiB, since 5.16 8 MiB. Whoever raises it for RDMA, whose buffers are locked, raises it to
# unlimited or a share of the memory: less than this was forgotten.
LEAST_LOCKED_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class RankInventory:
    """What one rank runs on; null where nobody says."""

    host: str = key("name of the machine")
    device: str = key("what the hardware calls itself")
    kind: str = key("cuda, mps or cpu")
    lacks_gpu: bool = key("whether Slurm gave the job GPUs on this node, and this rank has none")
    cores: int = key("cores that the process may use")
    numa_nodes: tuple[int, ...] | None = key("NUMA nodes of these cores")
    memory_nodes: tuple[int, ...] | None = key("NUMA nodes whose memory the process may use")
    locked_memory_bytes: int | None = key("memory that it may lock, `ulimit -l`, bytes; null: unlimited")
    kernel: str = key("release of the operating system's kernel")
    torch: str = key("version of torch")
    cuda: str | None = key("version of CUDA that torch was built with")
    cudnn: str | None = key("version of cuDNN")
    nccl: str | None = key("version of NCCL, where the device is a GPU")
    driver: str | None = key("version of NVIDIA's driver")
    gpu: Gpu | None = key("what NVML says of the rank's GPU")
    no_gpu_why: str | None = key("why NVML says nothing; null where it does")


SOFTWARE = ("torch", "cuda", "cudnn", "nccl", "driver", "kernel")


def take_inventory(world: World) -> tuple[RankInventory, ...]:
    """What every rank runs on, by rank, the same on every rank. A GPU is given about a second's work meanwhile."""
    numa_nodes, memory_nodes = _numa()
    gpu, why = read_gpu(world)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    is_cuda = world.device.type == "cuda"
    mine = RankInventory(
        host=gethostname(),
        device=world.device_name(),
        kind=world.device.type,
        lacks_gpu=lacks_gpu(world),
        cores=len(_cores()),
        numa_nodes=numa_nodes,
        memory_nodes=memory_nodes,
        locked_memory_bytes=None if locked == resource.RLIM_INFINITY else locked,
        kernel=platform.release(),
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        cudnn=_version(torch.backends.cudnn.version) if is_cuda else None,
        nccl=_version(torch.cuda.nccl.version) if is_cuda else None,
        driver=(gpu and gpu.driver) or _driver(),
        gpu=gpu,
        no_gpu_why=why,
    )
    return tuple(world.gather(mine))


def judge_inventory(before: Sequence[RankInventory], after: Sequence[RankInventory]) -> list[Check]:
    """What differs between ranks, and which GPUs say fault; before, after: the acceptance, by rank."""
    lacking = [i for i, rank in enumerate(after) if rank.lacks_gpu]
    devices = [rank.device for rank in after]
    device = Check.of(lacking, name="device", found=_tally(devices), expected="a GPU, as the job has some on this node")
    nodes = [f" of {counted(len(rank.numa_nodes), 'NUMA node')}" if rank.numa_nodes else "" for rank in after]
    cores = [f"{counted(rank.cores, 'core')}{of}" for rank, of in zip(after, nodes, strict=True)]
    checks = [device if lacking else _alike("device", devices), _software(after), _alike("cores", cores)]
    checks.append(_locked_memory(after))
    if all(rank.gpu is None for rank in after):
        return [*checks, Check.unknown("GPU health", _tally([rank.no_gpu_why or "not known" for rank in after]))]
    gpus = [rank.gpu for rank in after]
    return [
        *checks,
        _health(
            "GPU memory errors", [_memory_errors(b.gpu, a.gpu) for b, a in zip(before, after, strict=True)], "none"
        ),
        _health("GPU memory rows", [_rows(gpu) for gpu in gpus], "none pending, none failed"),
        _health("PCIe width", [_pcie_width(gpu) for gpu in gpus], "what device and slot allow"),
        _health("PCIe generation", [_pcie_generation(gpu) for gpu in gpus], "what device and slot allow, at work"),
        _nvlinks(gpus),
        _power_cap(gpus),
        _throttling([rank.gpu for rank in before], gpus),
    ]


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _numa() -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """(nodes of the cores that this process may use, nodes whose memory it may use); None: not known."""
    nodes: tuple[int, ...] = ()
    memory = None
    with suppress(OSError, ValueError):
        if allowed := re.search(r"Mems_allowed_list:\s*(\S+)", PROCESS_STATUS.read_text()):
            memory = tuple(sorted(_numbers(allowed[1])))
    with suppress(OSError, ValueError):
        cores_of = {int(path.name[4:]): _numbers((path / "cpulist").read_text()) for path in NODES.glob("node[0-9]*")}
        nodes = tuple(sorted(node for node, cores in cores_of.items() if cores & _cores()))
    return nodes or None, memory


def _numbers(text: str) -> set[int]:
    """Those of a list as the kernel writes it: '0-2,5'."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {number for low, _, high in ranges for number in range(int(low), int(high or low) + 1)}


def _version(ask: Callable[[], Any]) -> str | None:
    with suppress(Exception):  # a build without the library
        answer = ask()
        return ".".join(map(str, answer)) if isinstance(answer, tuple) else str(answer)
    return None


def _driver() -> str | None:
    with suppress(OSError):
        if found := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", DRIVER_VERSION.read_text()):
            return found[1]
    return None


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > 8:
        return f"{len(ranks):,} ranks"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _tally(values: Sequence[str]) -> str:
    """The value of all, or each value with its ranks, the most common first."""
    counts = Counter(values).most_common()
    of = {value: [i for i, other in enumerate(values) if other == value] for value, _ in counts}
    return values[0] if len(of) == 1 else "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in of.items())


def _unlike(values: Sequence[object]) -> list[int] | bool:
    """The ranks that differ from most; True where they differ and no value is the most common."""
    (usual, count), *others = Counter(values).most_common()
    if others and others[0][1] == count:
        return True
    return [i for i, value in enumerate(values) if value != usual]


def _alike(name: str, values: Sequence[str]) -> Check:
    if len(values) == 1:
        return Check.unknown(name, f"{values[0]}; one rank: no other to compare with")
    return Check.of(_unlike(values), name=name, found=_tally(values), expected="the same on every rank")


def _software(ranks: Sequence[RankInventory]) -> Check:
    told = {name: [f"{name} {getattr(rank, name) or 'none'}" for rank in ranks] for name in SOFTWARE}
    alike = ", ".join(values[0] for values in told.values() if not _unlike(values))
    unlike = {name: blamed for name, values in told.items() if (blamed := _unlike(values))}
    if not unlike:
        return _alike("software", [alike] * len(ranks))
    named = sorted({rank for blamed in unlike.values() if not isinstance(blamed, bool) for rank in blamed})
    found = "; ".join(_tally(told[name]) for name in unlike)
    return Check.of(named or True, name="software", found=found, expected="the same on every rank")


def _locked_memory(ranks: Sequence[RankInventory]) -> Check:
    """RDMA, between nodes, is held to LEAST_LOCKED_BYTES."""
    limits = [rank.locked_memory_bytes for rank in ranks]
    told = ["unlimited" if limit is None else f"{limit // 1024:,} KiB" for limit in limits]
    several = len({rank.host for rank in ranks}) > 1 and any(rank.kind == "cuda" for rank in ranks)
    low = [i for i, limit in enumerate(limits) if several and limit is not None and limit < LEAST_LOCKED_BYTES]
    if not low:
        return _alike("locked memory", told)
    return Check.of(low, name="locked memory", found=_tally(told), expected="1 GiB at least, for RDMA: ulimit -l")


Told = tuple[bool, str] | None  # whether a GPU is at fault, and its figure; None: NVML does not say


def _health(name: str, told: Sequence[Told], expected: str) -> Check:
    blamed = [i for i, each in enumerate(told) if each and each[0]]
    found = _tally([each[1] if each else "not given by NVML" for each in told])
    if None in told and not blamed:
        return Check.unknown(name, found)
    return Check.of(blamed, name=name, found=found, expected=expected)


def _memory_errors(before: Gpu | None, after: Gpu | None) -> Told:
    if after is None or after.ecc_uncorrected is None:
        return None
    known = before.ecc_uncorrected if before else None
    new = (
        f", {after.ecc_uncorrected - known} of them during the acceptance"
        if known is not None and after.ecc_uncorrected
        else ""
    )
    return after.ecc_uncorrected > 0, f"{after.ecc_uncorrected} uncorrected{new}"


def _rows(gpu: Gpu | None) -> Told:
    if gpu is None or gpu.remap_pending is None or gpu.remap_failed is None:
        return None
    faults = [", one pending"] * gpu.remap_pending + [", one failed"] * gpu.remap_failed
    return bool(faults), f"{gpu.remapped_rows} remapped" + "".join(faults)


def _pcie_width(gpu: Gpu | None) -> Told:
    if gpu is None or gpu.pcie_width is None or gpu.max_pcie_width is None:
        return None
    return gpu.pcie_width < gpu.max_pcie_width, f"x{gpu.pcie_width} of x{gpu.max_pcie_width}"


def _pcie_generation(gpu: Gpu | None) -> Told:
    """Of a GPU at work only: an idle link is slow on purpose."""
    if gpu is None or gpu.pcie_generation is None or gpu.max_pcie_generation is None:
        return None
    if gpu.throttle_reasons is None or "idle" in gpu.throttle_reasons:
        return None
    return gpu.pcie_generation < gpu.max_pcie_generation, f"{gpu.pcie_generation} of {gpu.max_pcie_generation}"


def _nvlinks(gpus: Sequence[Gpu | None]) -> Check:
    """Those with fewer inactive links are right: a board may leave some unused, but on every GPU alike."""
    inactive = [
        g.nvlinks - g.nvlinks_active if g and g.nvlinks and g.nvlinks_active is not None else None for g in gpus
    ]
    fewest = min((count for count in inactive if count is not None), default=0)
    told: list[Told] = [
        None if g is None or count is None else (count > fewest, f"{g.nvlinks_active} of {g.nvlinks} active")
        for g, count in zip(gpus, inactive, strict=True)
    ]
    check = _health("NVLinks", told, "every link active")
    if fewest and not check.ranks:
        return Check.unknown("NVLinks", f"{check.found}: the board's design, or a fault of all")
    return check


def _power_cap(gpus: Sequence[Gpu | None]) -> Check:
    told: list[Told] = [
        (gpu.power_cap_w < gpu.default_power_cap_w, f"{gpu.power_cap_w:.0f} W of {gpu.default_power_cap_w:.0f} W")
        if gpu and gpu.power_cap_w is not None and gpu.default_power_cap_w is not None
        else None
        for gpu in gpus
    ]
    check = _health("GPU power cap", told, "the device's default, the same on every rank")
    if check.verdict is not Verdict.PASS:
        return check
    unlike = _unlike([gpu and gpu.power_cap_w for gpu in gpus])
    return Check.of(unlike, name=check.name, found=check.found, expected=check.expected)


def _throttling(before: Sequence[Gpu | None], after: Sequence[Gpu | None]) -> Check:
    """By heat or by a lack of power, when either was taken; with temperatures and clocks, held to nothing."""
    told: list[Told] = []
    for first, last in zip(before, after, strict=True):
        if last is None or last.throttle_reasons is None:
            told.append(None)
            continue
        reasons = sorted(FAULTY_REASONS & {*last.throttle_reasons, *((first and first.throttle_reasons) or ())})
        told.append((bool(reasons), ", ".join(reasons) or "none"))
    check = _health("GPU throttling", told, "none by heat or a lack of power")
    temperatures = [gpu.temperature_c for gpu in after if gpu and gpu.temperature_c is not None]
    clocks = [gpu.sm_clock_mhz for gpu in after if gpu and gpu.sm_clock_mhz is not None]
    spans = [
        f"{min(figures)} to {max(figures)} {unit}"
        for figures, unit in ((temperatures, "°C"), (clocks, "MHz"))
        if figures
    ]
    return replace(check, found="; ".join([check.found, *spans]))
