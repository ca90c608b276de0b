"""Several processes, each with the whole model and its rows of the global batch: DistributedDataParallel."""

from contextlib import nullcontext
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from nanogpt.engine.base import Batch, Compilation, EngineOptions
from nanogpt.engine.compile import compile_model
from nanogpt.engine.single import SingleEngine


class RuntimeStatistics(TypedDict, total=False):
    """What DDP's clocks have measured in the newest step, ns; absent after the first one. It tells more than this."""

    backward_comm_time: int
    backward_compute_comm_overlap_time: int


class DDPEngine(SingleEngine):
    """The single engine with its gradient averaged over the ranks."""

    name = "ddp"

    def forward_backward(self, batch: Batch, *, is_last: bool) -> None:
        # no_sync must enclose the forward too: DDP decides there whether this backward communicates.
        with nullcontext() if is_last else self._ddp.no_sync():
            super().forward_backward(batch, is_last=is_last)

    def exposed_communication_s(self) -> float | None:
        assert self._ddp.logger is not None
        self._ddp.logger.set_runtime_stats_and_log()  # else DDP reads its clocks in the next forward
        figures: RuntimeStatistics = self._ddp._get_ddp_logging_data()
        communication_ns = figures.get("backward_comm_time", 0) - figures.get("backward_compute_comm_overlap_time", 0)
        return self._summing_s + max(0, communication_ns) / 1e9

    def _compile(self, options: EngineOptions) -> Compilation:
        """DDP is inside what is compiled: torch then cuts the graph at DDP's buckets, which leave one by one."""
        device = self.world.device
        self._ddp = DistributedDataParallel(
            self.model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # saves one copy of the gradient
        )
        self._ddp._set_ddp_runtime_logging_sample_rate(1)  # time every step, not every hundredth
        if options.gradient_compression == "bf16":
            self._ddp.register_comm_hook(None, _send_in_bf16)
        self._settle_buckets(options.micro_batches[0])
        with self._ddp.no_sync():  # one rank's compilation may fail while others would wait for its gradient
            return compile_model(self._ddp, self.world, options)

    def _settle_buckets(self, batch: Batch) -> None:
        """Let DDP see in which order gradients come, by a backward of one window that is forgotten.

        After its first backward it lays its buckets out by that order, once. In which order three ranks or more sum up
        a value depends on its place in a bucket: a run that goes on would have steps after its first that differ from
        an undisturbed run's in the last bit.
        """
        with self.world.autocast(self.dtype):
            losses: Tensor = self._ddp(batch.idx[:1], batch.targets[:1], reduction="none")
        losses.sum().backward()
        self._clear_gradient()

    def _gradient_scale(self) -> float:
        return float(self.world.size)  # DDP divides the summed gradient by it


def _send_in_bf16(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """torch's hook, which DDP refuses by its name on all but NCCL; gloo can do it as well."""
    return bf16_compress_hook(None, bucket)  # type: ignore[arg-type]  # None, of all ranks, is missing in torch's types
