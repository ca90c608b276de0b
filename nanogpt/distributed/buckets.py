"""Parameters side by side in flat tensors, of which each rank owns one chunk.

buckets = [Bucket(named, world) for named in in_buckets(model.named_parameters(), world)]
bucket.reduce(), bucket.reduced()       # its gradient, once it is complete: this rank's chunk is the sum over the ranks
bucket.gather(), bucket.gathered()      # its weights, once every rank has written its chunk: all ranks have the whole
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt.distributed.world import World

ROW = 1024  # values that a chunk is a multiple of: 4 kB of fp32, which suits all collectives and kernels
# Of a chunk, about. A collective sends one chunk after another, as many as there are ranks: each large beside the
# latency of a link, 15 us at 320 GB/s say, and of few ranks so small that it goes while the backward goes on.
CHUNK_BYTES = 6 * 2**20

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Stretch:
    """Values of a parameter that are in this rank's chunk of its bucket."""

    name: str
    start: int  # of the parameter's flattened values
    at: int  # in the chunk
    length: int


class Bucket:
    """Some parameters and their gradients, in fp32. Every rank must call every method, of its buckets in one order."""

    def __init__(self, parameters: Iterable[Named], world: World, *, unit: int = ROW, compressed: bool = False) -> None:
        """Moves the parameters into the bucket: a model computes with them as before.

        unit: values that a chunk's length is a multiple of. compressed: whether gradients are sent in bf16.
        """
        self._world, self._compressed = world, compressed and world.size > 1
        self.parameters = list(parameters)
        length = -(-sum(p.numel() for _, p in self.parameters) // (world.size * unit)) * unit  # of a chunk
        self.weights = torch.zeros(world.size * length, device=self.parameters[0][1].device)
        self.gradients = torch.zeros_like(self.weights)
        mine = slice(world.rank * length, (world.rank + 1) * length)
        # What the optimizer sees. A part of the whole, so that nothing is copied before or after a collective.
        self.chunk = nn.Parameter(self.weights[mine])
        self.chunk.grad = self.chunk_gradient = self.gradients[mine]
        self._work: dist.Work | None = None
        self._starts, at = [], 0
        for _, parameter in self.parameters:
            part = slice(at, at + parameter.numel())
            self._starts.append(at)
            self.weights[part] = parameter.detach().flatten()
            parameter.data = self.weights[part].view(parameter.shape)
            parameter.grad = self.gradients[part].view(parameter.shape)  # a backward adds to it, in place
            at = part.stop

    def stretches(self) -> Iterator[Stretch]:
        """What this rank's chunk holds; no padding."""
        low = self._world.rank * self.chunk.numel()
        high = low + self.chunk.numel()
        for (name, parameter), at in zip(self.parameters, self._starts, strict=True):
            start, stop = max(low, at), min(high, at + parameter.numel())
            if start < stop:
                yield Stretch(name, start - at, start - low, stop - start)

    def reduce(self) -> None:
        """Begin to sum the gradient over the ranks, each its chunk."""
        sent, received = self.gradients, self.chunk_gradient
        if self._compressed:
            sent, received = sent.bfloat16(), torch.empty_like(received, dtype=torch.bfloat16)
        self._work, self._in_flight = self._world.begin_reduce_scatter(sent, received), (sent, received)

    def reduced(self) -> None:
        """Until the chunk's gradient is the sum: on a GPU the next kernels wait, not the host."""
        self._wait()
        if self._compressed:
            self.chunk_gradient.copy_(self._in_flight[1])
        del self._in_flight

    def gather(self) -> None:
        """Begin to give every rank's chunk of the weights to all."""
        self._work = self._world.begin_all_gather(self.chunk.detach(), self.weights)

    def gathered(self) -> None:
        """Until the weights are whole, in the same sense."""
        self._wait()

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work = None


def in_buckets(parameters: Iterable[Named], world: World) -> Iterator[list[Named]]:
    """The parameters, in their order, as many together as make chunks of CHUNK_BYTES or more."""
    held: list[Named] = []
    for each in parameters:
        held.append(each)
        if sum(p.nbytes for _, p in held) >= world.size * CHUNK_BYTES:
            yield held
            held = []
    if held:
        yield held


def in_equal_buckets(parameters: Iterable[Named], world: World) -> Iterator[list[Named]]:
    """The same, each of one shape: with a parameter as unit, chunks hold whole ones, the last bucket's maybe none."""
    of_shape: dict[torch.Size, list[Named]] = {}
    for each in parameters:
        of_shape.setdefault(each[1].shape, []).append(each)
    for alike in of_shape.values():
        many = world.size * max(1, CHUNK_BYTES // alike[0][1].nbytes)
        for start in range(0, len(alike), many):
            yield alike[start : start + many]


def flat_rows(values: Tensor) -> Tensor:
    """A chunk's values in rows of at most ROW, to be added up row by row."""
    return values.view(-1, ROW) if values.numel() % ROW == 0 else values.view(1, -1)
