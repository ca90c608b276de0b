"""Parameters side by side in flat tensors, of which each rank owns one chunk.

buckets = [Bucket(named, world) for named in in_buckets(model.named_parameters(), world)]
bucket.reduce(), bucket.reduced()       # its gradient, once it is complete: this rank's chunk is the sum over the ranks
bucket.gather(), bucket.gathered()      # its weights, once every rank has written its chunk: all ranks have the whole

Both can go in bf16, in half the bytes. A weight that the forward casts to bf16 loses nothing by that, nor does its
gradient in a step of one micro-batch, which is a bf16 number then, if all of them are sent as they are and summed in
fp32 where they arrive. That is for the ranks of one node: between nodes every rank's numbers would have to travel, and
a reduce-scatter sends the sums of a node alone, but of bf16 numbers it rounds them.
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

    def __init__(
        self,
        parameters: Iterable[Named],
        world: World,
        *,
        unit: int = ROW,
        gradient_dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Moves the parameters into the bucket: a model computes with them as before.

        unit: values that a chunk's length is a multiple of. gradient_dtype, weight_dtype: what they are sent in.
        """
        self._world = world
        self._halves_gradients, self._halves_weights = (
            dtype != torch.float32 and world.collects for dtype in (gradient_dtype, weight_dtype)
        )
        self.parameters = list(parameters)
        length = -(-sum(p.numel() for _, p in self.parameters) // (world.size * unit)) * unit  # of a chunk
        self.weights = torch.zeros(world.size * length, device=self.parameters[0][1].device)
        self.gradients = torch.zeros_like(self.weights)
        self._mine = mine = slice(world.rank * length, (world.rank + 1) * length)
        # What the optimizer sees. A part of the whole, so that nothing is copied before or after a collective.
        self.chunk = nn.Parameter(self.weights[mine])
        self.chunk.grad = self.chunk_gradient = self.gradients[mine]
        self._work: dist.Work | None = None
        self._in_flight: tuple[Tensor, ...] = ()  # what is sent and what is received, where neither stays
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
        low, high = self._mine.start, self._mine.stop
        for (name, parameter), at in zip(self.parameters, self._starts, strict=True):
            start, stop = max(low, at), min(high, at + parameter.numel())
            if start < stop:
                yield Stretch(name, start - at, start - low, stop - start)

    def reduce(self) -> None:
        """Begin to sum the gradient over the ranks, each its chunk."""
        if not self._halves_gradients:
            self._work = self._world.begin_reduce_scatter(self.gradients, self.chunk_gradient)
            return
        sent = self.gradients.bfloat16()
        if self._world.local_size == self._world.size:
            self._in_flight = sent, torch.empty_like(sent)
            self._work = self._world.begin_all_to_all(*self._in_flight)
        else:
            self._in_flight = sent, torch.empty_like(self.chunk_gradient, dtype=sent.dtype)
            self._work = self._world.begin_reduce_scatter(*self._in_flight)

    def reduced(self) -> None:
        """Until the chunk's gradient is the sum: on a GPU the next kernels wait, not the host."""
        for received in self._wait():  # of each rank, or their sum
            torch.sum(received.view(-1, len(self.chunk)), 0, dtype=torch.float32, out=self.chunk_gradient)

    def gather(self, *, exactly: bool) -> None:
        """Begin to give every rank's chunk of the weights to all; exactly: in fp32, whatever they are sent in else."""
        if exactly or not self._halves_weights:
            self._work = self._world.begin_all_gather(self.chunk.detach(), self.weights)
            return
        sent = self.chunk.detach().bfloat16()
        self._in_flight = sent, torch.empty_like(self.weights, dtype=sent.dtype)
        self._work = self._world.begin_all_gather(*self._in_flight)

    def gathered(self) -> None:
        """Until the weights are whole, in the same sense."""
        for received in self._wait():
            for others in (slice(0, self._mine.start), slice(self._mine.stop, None)):  # this rank's stay exact
                self.weights[others].copy_(received[others])

    def _wait(self) -> tuple[Tensor, ...]:
        """What was received, and is to be put in its place."""
        if self._work is not None:
            self._work.wait()
        received, self._work, self._in_flight = self._in_flight[1:], None, ()
        return received

    @property
    def seen_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values) as a forward sees them, on every rank alike."""
        for name, parameter in self.parameters:
            values = parameter.detach()
            yield name, values.bfloat16() if self._halves_weights else values


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
