"""A tensor on its way from the device to the host.

sums = HostCopy(tensor)     # waits for nothing
sums.tolist()               # waits for the tensor, not for what the device was given after it
"""

from typing import cast

import torch
from torch import Tensor


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
