"""Who am I in the run: rank, device, and the few collectives that the rest needs. Read once, then passed on.

    world = World.from_env()
    with world.process_group():
        total, count = world.sum(3.5, 2.0)

Everything that differs between CUDA, MPS and CPU is here; at world size 1 every collective is the identity.
"""

import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.config.errors import ConfigError, RunError, one_line
from nanogpt.distributed.rendezvous import meet
from nanogpt.utils.malloc import keep_freed_memory

Gathered = TypeVar("Gathered")

# Their names since torch 2.13, where the old ones warn, and before.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Longer than the slowest rank's compilation, shorter than anybody's patience with a hung job.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
MARGIN = timedelta(minutes=1)
LARGEST_PORT = 2**16 - 1
PROCESS_STATUS = Path("/proc/self/status")
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class World:
    """One process's place among all processes of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int = 1  # ranks on this machine, which share its memory

    @classmethod
    def from_env(cls) -> "World":
        """What torchrun put into the environment, or a world of one. Raises ConfigError when it cannot be."""
        env = os.environ
        try:
            rank, size, local_rank = (
                int(env.get(*v)) for v in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            )
            # torchrun's name for it, the deepspeed launcher's, or the least that it can be
            local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or local_rank + 1)
        except ValueError:
            raise ConfigError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers: start with torchrun") from None
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise ConfigError(
                f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_size} do not fit "
                f"together: start with torchrun, or unset them"
            )
        if size > 1:
            _check_address(size)
        device = _pick_device(local_rank, local_size, size)
        # NVIDIA's images let products of fp32 run in TF32 (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE): what is reported as fp32,
        # scores and MFU, must be that.
        torch.set_float32_matmul_precision("highest")
        return cls(rank=rank, local_rank=local_rank, size=size, device=device, local_size=local_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank that writes files and speaks to people."""
        return self.rank == 0

    def meet(self, *, timeout_s: float = 600.0, asked_to_stop: Callable[[], bool] = lambda: False) -> dist.Store | None:
        """Wait until every rank is there -> the store of this attempt; None where the rank is alone.

        Raises RunError with one line that names the missing ranks, StopRequested, ConfigError.
        """
        if self.size == 1:
            return None
        speaks = self.local_rank == 0
        return meet(rank=self.rank, size=self.size, timeout_s=timeout_s, asked_to_stop=asked_to_stop, speaks=speaks)

    @contextmanager
    def process_group(
        self, store: dist.Store | None = None, *, timeout_s: float = 600.0, even_alone: bool = False
    ) -> Iterator[None]:
        """The default process group around a run: NCCL between GPUs, gloo between CPUs.

        store: of meet(), which is called where there is none yet.
        timeout_s: how long the program means to wait for a rank; a collective, which cannot say why, waits longer.
        even_alone: for DeepSpeed, which needs a group there too. It is there to save memory, so what is freed on a CPU
        goes back to the kernel.
        """
        cuda = self.device.type == "cuda"
        if self.device.type == "cpu" and not even_alone:
            keep_freed_memory()
        if cuda:
            torch.cuda.set_device(self.device)  # before anything allocates, or every rank would use GPU 0
        if self.size == 1 and not even_alone:
            yield
            return
        timeout = max(timedelta(seconds=timeout_s), COLLECTIVE_TIMEOUT) + MARGIN
        store = store or self.meet(timeout_s=timeout_s) or dist.HashStore()
        store.set_timeout(timeout)
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo", timeout=timeout, device_id=self.device if cuda else None,
                store=store, rank=self.rank, world_size=self.size,
            )  # fmt: skip
        except RuntimeError as error:  # a rank has gone since
            raise RunError(f"rank {self.rank} cannot connect to the others: {one_line(error)}") from None
        yield
        # Not after an exception: with a peer gone both would wait for the time-out. The barrier is for torchrun, which
        # ends all ranks as soon as one leaves with a status other than 0, and the first may still be writing.
        dist.barrier()
        dist.destroy_process_group()

    @property
    def collects(self) -> bool:
        """Whether the collectives of a step are made: one rank needs none."""
        return self.size > 1

    @property
    def sum_dtype(self) -> torch.dtype:
        """What sums over many values are made in: double precision, where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def on_device(self, *values: float) -> Tensor:
        """values as a tensor of sum_dtype, for whose copy to a GPU the host does not wait."""
        tensor = torch.tensor(values, dtype=self.sum_dtype, pin_memory=self.device.type == "cuda")
        return tensor.to(self.device, non_blocking=True)

    def sum(self, *values: float) -> tuple[float, ...]:
        """Element-wise sums over the ranks, in double precision, on every rank."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> tuple[float, ...]:
        """Element-wise maxima over the ranks, on every rank."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum_tensor(self, values: Tensor) -> Tensor:
        """values summed over the ranks, in place, on every rank."""
        if self.collects:
            dist.all_reduce(values)
        return values

    def max_tensor(self, values: Tensor) -> Tensor:
        """The element-wise maxima of values over the ranks, in place, on every rank."""
        if self.collects:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    # Begun, and done when what they return has been waited for; None: there is nothing to wait for. A share may be this
    # rank's part of the values themselves.

    def begin_reduce_scatter(self, values: Tensor, share: Tensor) -> dist.Work | None:
        """Sum values over the ranks, in equal shares in order of rank, this rank's into share."""
        return self._begin(reduce_scatter, share, values)

    def begin_all_gather(self, share: Tensor, values: Tensor) -> dist.Work | None:
        """Put every rank's share, of one size, into values in order of rank, on every rank."""
        return self._begin(all_gather, values, share)

    def begin_all_to_all(self, values: Tensor, shares: Tensor) -> dist.Work | None:
        """Give each rank its equal share of values, in order of rank; shares: this rank's of every rank's values."""
        return self._begin(dist.all_to_all_single, shares, values)

    def _begin(self, collective: Callable[..., dist.Work | None], output: Tensor, given: Tensor) -> dist.Work | None:
        return collective(output, given, async_op=True) if self.collects else None

    def all_gather(self, share: Tensor, values: Tensor) -> None:
        """begin_all_gather, done when this returns: on a GPU what it is given next waits, not the host."""
        if (work := self.begin_all_gather(share, values)) is not None:
            work.wait()

    def gather(self, value: Gathered) -> list[Gathered]:
        """value of every rank, in order of rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def fill(self, values: Tensor, read: Callable[[int, int], Tensor]) -> None:
        """Fill values, (n,), on every rank with read(0, n), of which each rank reads a part: (start, stop) of it.

        The parts are equal, as gloo wants them; the rest, fewer values than there are ranks, each rank reads itself.
        """
        part = len(values) // self.size if self.size > 1 else 0
        if part:
            mine = read(part * self.rank, part * (self.rank + 1)).to(values.device, values.dtype)
            self.all_gather(mine, values[: part * self.size])
        if (rest := part * self.size) < len(values):
            values[rest:].copy_(read(rest, len(values)))

    def rows(self, count: int) -> slice:
        """This rank's contiguous share of count rows; shares differ by one row at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def parts(self, items: Tensor, rows: int) -> tuple[Tensor, ...]:
        """This rank's contiguous share of items along their first dimension, in parts of at most `rows`.

        Every rank has as many parts, so that a model whose forward is itself a collective (ZeRO 3) meets on every rank;
        where there are fewer items than ranks, a part may be empty.
        """
        each = max(1, -(-len(items) // (self.size * rows)))
        return items.tensor_split(each * self.size)[each * self.rank : each * (self.rank + 1)]

    def wait_for_device(self) -> None:
        """Until the device has done what it was given, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_of(self, work: Callable[[], object]) -> float:
        """How long work takes on the device, and nothing that the device was given before."""
        self.wait_for_device()
        began = time.perf_counter()
        work()
        self.wait_for_device()
        return time.perf_counter() - began

    def autocast(self, dtype: str) -> AbstractContextManager[object]:
        """The context that computes in dtype ('bf16' or 'fp32') on fp32 weights."""
        return nullcontext() if dtype == "fp32" else torch.autocast(self.device.type, dtype=torch.bfloat16)

    def device_name(self) -> str:
        """What the hardware calls itself, for config.json."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return _cpu_name() if self.device.type == "cpu" else self.device.type

    def peak_memory_bytes(self) -> int:
        """Most memory that this rank has held: allocated on a GPU, resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Not getrusage on Linux: a process starts there with the peak of the one that launched it, a notebook say.
        status = PROCESS_STATUS.read_text() if PROCESS_STATUS.exists() else ""
        if own := re.search(r"VmHWM:\s*(\d+) kB", status):  # not every sandbox's kernel says it
            return int(own[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _reduce(self, values: tuple[float, ...], op: dist.ReduceOp.RedOpType) -> tuple[float, ...]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tuple(tensor.tolist())


def _check_address(size: int) -> None:
    """Of the first rank, where all meet. Raises ConfigError."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not (host and port):
        raise ConfigError(f"WORLD_SIZE={size} without MASTER_ADDR and MASTER_PORT: start with torchrun")
    if not (port.isdecimal() and 1 <= int(port) <= LARGEST_PORT):
        raise ConfigError(f"MASTER_PORT={port} must be a number from 1 to {LARGEST_PORT}")


def _pick_device(local_rank: int, local_size: int, size: int) -> torch.device:
    if torch.cuda.is_available():
        if size > 1 and "LOCAL_RANK" not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE={size} without LOCAL_RANK, the rank within its machine, would put every rank on the first "
                f"GPU: start with torchrun"
            )
        if local_size > (gpus := torch.cuda.device_count()):
            raise ConfigError(f"{local_size} processes on a node with {gpus} GPUs: start with --nproc_per_node={gpus}")
        return torch.device("cuda", local_rank)
    if size == 1 and torch.backends.mps.is_available():  # gloo cannot reduce MPS tensors
        return torch.device("mps")
    return torch.device("cpu")


def _cpu_name() -> str:
    """What the kernel calls it. A hypervisor's "AMD EPYC" is many generations, so family and model are told too."""
    try:
        with CPU_INFO.open() as info:
            fields = [line.partition(":") for line in takewhile(str.strip, info)]  # the first core's
    except OSError:
        return "cpu"
    told = {key.strip(): value.strip() for key, _, value in fields}
    name = told.get("model name", "cpu")
    numbered = re.search(r"\d{3}", name)  # "@ 2.20GHz" is a clock
    if not numbered and {"cpu family", "model"} <= told.keys():
        return f"{name} (family {told['cpu family']}, model {told['model']})"
    return name
