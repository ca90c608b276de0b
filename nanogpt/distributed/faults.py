"""Breaks a run on purpose, in one rank at one step: what a cluster does to runs, where its handling can be looked at.

phases.listen(InjectedFault(Fault.parse("kill:rank=1,step=12"), model, weights))

It happens in a run that begins, not in one that goes on, so that the same command recovers from it.
"""

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from nanogpt.config.fault import Fault
from nanogpt.model.gpt import GPT
from nanogpt.utils.phases import PhaseListener

SLOWER_S = 0.3  # each forward, from the step on
ROOM_BYTES = 8 * 2**20  # that a file may have then: less than the weights of a small model
BIT = 22  # of an fp32 number, the highest of its fraction: a weight changes by up to a half


class InjectedFault(PhaseListener):
    """Of the rank that it names; on others it is not built."""

    def __init__(self, fault: Fault, model: GPT, weights: Sequence[Tensor]) -> None:
        """weights: what this rank holds of them."""
        self._fault, self._model, self._weights = fault, model, weights
        self._hooks: list[RemovableHandle] = []

    def enter(self, name: str, *, step: int | None, patient: bool) -> None:
        if name == "forward and backward" and step == self._fault.step:
            ACTIONS[self._fault.kind](self)
        if name == "update":
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def kill(self) -> None:
        """As a machine that runs out of memory does."""
        os.kill(os.getpid(), signal.SIGKILL)

    def freeze(self) -> None:
        """All of its threads, until somebody lets it go on."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def slow(self) -> None:
        """As a hot processor, or one that is shared: the forward takes longer from now on."""
        self._model.lm_head.register_forward_pre_hook(lambda *_: time.sleep(SLOWER_S))

    def nan(self) -> None:
        """In the step's gradient."""
        self._spoil(lambda gradient: torch.full_like(gradient, torch.nan))

    def drop_gradient(self) -> None:
        """The rank takes part in the step, and gives nothing to it."""
        self._spoil(torch.zeros_like)

    def flip(self) -> None:
        """One bit of one weight, in the middle of the largest tensor that this rank holds."""
        weight = max(self._weights, key=Tensor.numel).detach().view(-1)
        bits = weight.view(torch.int32 if weight.element_size() == 4 else torch.int16)
        bits[len(bits) // 2] ^= 1 << (BIT if weight.element_size() == 4 else BIT - 16)

    def full_disk(self) -> None:
        """No file can grow any more, as far as one process can see: a disk that is full can only be had with one."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, ROOM_BYTES))

    def _spoil(self, change: Callable[[Tensor], Tensor]) -> None:
        self._hooks += [parameter.register_hook(change) for parameter in self._model.parameters()]


ACTIONS: dict[str, Callable[[InjectedFault], None]] = {
    "kill": InjectedFault.kill,
    "freeze": InjectedFault.freeze,
    "slow": InjectedFault.slow,
    "nan": InjectedFault.nan,
    "flip": InjectedFault.flip,
    "full_disk": InjectedFault.full_disk,
    "drop_gradient": InjectedFault.drop_gradient,
}
