"""Several processes, each with the whole model and its rows of the global batch: DistributedDataParallel."""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nanogpt.engine.base import Batch
from nanogpt.engine.single import SingleEngine
from nanogpt.model import GPT
from nanogpt.world import World


class DDPEngine(SingleEngine):
    """The single engine with its gradient averaged over the ranks."""

    name = "ddp"

    def __init__(self, model: GPT, world: World, *, dtype: str, micro_batches: Sequence[Batch], compile: bool) -> None:
        super().__init__(model, world, dtype=dtype, micro_batches=micro_batches, compile=compile)
        self.forward = DistributedDataParallel(
            self.forward,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # there are none
            gradient_as_bucket_view=True,  # saves one copy of the gradient
        )

    def forward_backward(self, batch: Batch, *, is_last: bool) -> Tensor:
        # no_sync must enclose the forward too: DDP decides there whether this backward communicates.
        with nullcontext() if is_last else self.forward.no_sync():
            return super().forward_backward(batch, is_last=is_last)

    def _gradient_scale(self) -> float:
        return float(self.world.size)  # DDP divides the summed gradient by it
