"""What the device could do, what it has left, and how long it takes over a part of a step.

mfu = flops_per_token(model.config, context_length=64) * tokens_per_s / peak_flops_per_s
"""

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from socket import gethostname

import torch

from nanogpt.distributed.world import World

# Dense matrix products, FLOP/s, from the makers' data sheets; bf16 with fp32 accumulation, fp32 without TF32 (torch's
# default). The first name whose words stand in the device's counts, so the longer ones come first.
PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250e12, "fp32": 75e12},
    "GH200": {"bf16": 989e12, "fp32": 67e12},
    "H200 NVL": {"bf16": 835e12, "fp32": 60e12},
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100 NVL": {"bf16": 835e12, "fp32": 60e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "H800": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "A800": {"bf16": 312e12, "fp32": 19.5e12},
    "A10G": {"bf16": 70e12, "fp32": 35e12},
    "A10": {"bf16": 125e12, "fp32": 31.2e12},
    "A40": {"bf16": 150e12, "fp32": 37.4e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
    "L40": {"bf16": 181e12, "fp32": 90.5e12},
    "L4": {"bf16": 121e12, "fp32": 30.3e12},
    "RTX 4090": {"bf16": 165e12, "fp32": 82.6e12},
    "RTX 3090": {"bf16": 71e12, "fp32": 35.6e12},
    "V100": {"fp32": 15.7e12},
}
MEASURED_S = 0.1  # of a thread, that the products of a CPU's measurement may take
WORTHWHILE = 1.2  # by how much bf16 products must be faster than fp32 ones: the casts around them cost time too
SIDE = 512  # of the matrices: large enough to be bound by arithmetic, some milliseconds each


def peak_flops_per_s(world: World, dtype: str) -> float | None:
    """What all ranks' devices together can do in dtype: a GPU by its data sheet, a CPU measured; None when unknown.

    A CPU's is that of one thread times the threads of its ranks, at most one a core: too high where cores slow each
    other down, so that MFU is never too good. Every rank must call.
    """
    if world.device.type == "cpu":
        threads = min(torch.get_num_threads(), os.cpu_count() or 1)
        ranks = world.gather((gethostname(), threads, _thread_flops_per_s(dtype, MEASURED_S)))
        return sum(
            min(1.0, (os.cpu_count() or 1) / sum(count for host, count, _ in ranks if host == mine)) * threads * thread
            for mine, threads, thread in ranks
        )
    own = table_peak(world.device_name(), dtype)
    (unknown, total) = world.sum(float(own is None), own or 0.0)
    return None if unknown else total


def best_dtype(world: World) -> str:
    """'bf16' where this rank's device multiplies matrices faster in it, else 'fp32'.

    A GPU says so. A CPU is measured, where it has instructions for bf16 at all: on some they are half as fast as fp32's
    (benchmarks/LOG.md).
    """
    if world.device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if world.device.type == "cpu" and cpu_has_bf16():
        bf16, fp32 = (_thread_flops_per_s(dtype, MEASURED_S) for dtype in ("bf16", "fp32"))
        return "bf16" if bf16 > WORTHWHILE * fp32 else "fp32"
    return "fp32"


def lacks_gpu(world: World) -> bool:
    """Whether Slurm gave the job GPUs on this node, and this rank has none."""
    return world.device.type != "cuda" and os.environ.get("SLURM_GPUS_ON_NODE", "") not in ("", "0")


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU has instructions for products in bf16."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def table_peak(device_name: str, dtype: str) -> float | None:
    """The data sheet's FLOP/s of a device called device_name; None for one that is not in the table."""
    if re.search(r"\b(MIG|Laptop|Max-Q|4090 D|Ti)\b", device_name):  # a part of a device, or another of its name
        return None
    return next((peaks.get(dtype) for name, peaks in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def _thread_flops_per_s(dtype: str, seconds: float) -> float:
    """The best of as many square matrix products as fit into seconds, on one thread, FLOP/s.

    By the thread's own clock, which stands while another process has the core: a busy machine is no slower one, all
    ranks must choose the same dtype, and a resumed run the one that it had.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a = torch.ones(SIDE, SIDE, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    best_s, until = float("inf"), time.thread_time() + seconds
    while (started := time.thread_time()) < until:
        a @ a
        best_s = min(best_s, time.thread_time() - started)
    torch.set_num_threads(threads)
    return 2 * SIDE**3 / best_s


class Stopwatch:
    """How long the device was at what was inside the newest time; nobody waits for it. It is not recorded in graphs.

    with watch: ...
    watch.seconds()     # once the device is known to be past it
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        self._began = self._ended = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        self._record(0)

    def __exit__(self, *_: object) -> None:
        self._record(1)
        self._ended = time.perf_counter()

    def seconds(self) -> float:
        """0 before the first time."""
        if self._events and self._ended:
            milliseconds: float = self._events[0].elapsed_time(self._events[1])
            return milliseconds / 1e3
        return self._ended - self._began

    def _record(self, which: int) -> None:
        if self._events and not torch.cuda.is_current_stream_capturing():
            self._events[which].record()


MEMINFO, CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_bytes(world: World) -> int | None:
    """What this rank's device has left for this rank and the others on it; None where nobody says."""
    return torch.cuda.mem_get_info(world.device)[0] if world.device.type == "cuda" else free_host_bytes()


def free_host_bytes() -> int | None:
    """The kernel's MemAvailable, or less where a control group, a batch system's or a container's, allows less."""
    found = []
    with suppress(OSError, StopIteration, ValueError):
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    return min(found + _cgroup_bytes(), default=None)


def _cgroup_bytes() -> list[int]:
    """What each control group around this process has left, version 2 and 1."""
    left = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            root, limit, usage = CGROUPS, "memory.max", "memory.current"
            if controllers:
                if "memory" not in controllers.split(","):
                    continue
                root, limit, usage = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            path = root / name.lstrip("/")
            for group in (path, *path.parents):
                if group == root.parent:
                    break
                with suppress(OSError, ValueError):  # no such file in a container; 'max'
                    stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # given up when needed
                    left.append(int((group / limit).read_text()) - int((group / usage).read_text()) + cache)
    return left
