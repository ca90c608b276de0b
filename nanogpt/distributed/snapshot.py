"""Tensors as they are now, on their way to the host while their device goes on changing them.

sums = HostCopy(tensor)                               # a small one; waits for nothing
sums.tolist()                                         # waits for the tensor, not for what the device was given after it
on_host = snapshot({"a": weight}, on_device=True)     # the device's work waits for a copy, this process for nothing
on_host()                                             # in a thread -> {"a": ...}, fp32, on the CPU
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor

# Of fp32, 64 MiB, pinned at a time: a device copies to pinned memory alone while it computes, and what one process has
# pinned is lost to all others of its machine.
STAGED_VALUES = 2**24


class HostCopy:
    """What is in a small tensor now."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._arrived = values.clone(), None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[float]:
        """The values, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return cast(list[float], self._host.tolist())


def snapshot(tensors: Mapping[str, Tensor], *, on_device: bool) -> Callable[[], dict[str, Tensor]]:
    """Copy tensors, each (n,), in the order of their device's work -> what gives the copies in fp32 on the CPU, once.

    on_device: copy on a GPU first, which has room for that. Otherwise this process waits for the copy to the host.
    """
    if on_device and any(values.is_cuda for values in tensors.values()):
        with suppress(torch.OutOfMemoryError):  # somebody else has taken the room since
            return DeviceCopies(tensors).on_host
    copies = {name: values.detach().to("cpu", torch.float32, copy=True) for name, values in tensors.items()}
    return lambda: copies


class DeviceCopies:
    """fp32 copies on one GPU, made on the stream that was current, and taken to the host on a stream of their own."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises OutOfMemoryError."""
        self._copies = {name: values.detach().to(torch.float32, copy=True) for name, values in tensors.items()}
        self._device = next(values.device for values in self._copies.values() if values.is_cuda)  # others: offloaded
        self._made = torch.cuda.current_stream(self._device).record_event()

    def on_host(self) -> dict[str, Tensor]:
        """The copies on the CPU; each is let go of on the GPU as soon as it has arrived. Called once, in any thread.

        A copy's memory belongs to the stream that made it, which may write to it again once nothing refers to it. It
        is let go of only when this thread has seen the side stream done with it, so there is no need of record_stream,
        whose events the allocator would have to query.
        """
        torch.cuda.set_device(self._device)  # a thread begins on the first GPU, and would pin memory through that
        aside = torch.cuda.Stream(self._device)
        aside.wait_event(self._made)
        staging = torch.empty(STAGED_VALUES, pin_memory=True)
        arrived = {}
        with torch.cuda.stream(aside):
            for name in [*self._copies]:
                arrived[name] = through(staging, self._copies[name], wait=aside.synchronize)
                del self._copies[name]
        return arrived


def through(staging: Tensor, values: Tensor, *, wait: Callable[[], None]) -> Tensor:
    """values, (n,), on the CPU, brought there through staging, (m,), in parts; wait: until a part has arrived in it."""
    host = torch.empty(values.shape, dtype=values.dtype)
    for source, target in zip(values.split(len(staging)), host.split(len(staging)), strict=True):
        part = staging[: len(source)]
        part.copy_(source, non_blocking=True)
        wait()  # before it is read here, and before the next part overwrites it
        target.copy_(part)
    return host
