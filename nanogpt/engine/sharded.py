"""Several processes that share out the update: each makes it for a part of the weights, and all get the result.

The gradient is reduce-scattered bucket by bucket while the backward goes on; each rank's optimizer, and the average of
the weights, see its chunks alone; then the new weights are all-gathered. That sends what DDP's all-reduce sends, but
for padding, and in bf16 the blocks' matrices in half the bytes (buckets.py), and divides the work and memory of the
update by the number of ranks (ZeRO's stage 1, Rajbhandari et al., arXiv 1910.02054). Nothing in a step waits on the
host, so a GPU can record it, collectives included (cuda_graph.py).
Compiled, the backward gives all gradients at its end, and no exchange is hidden.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nanogpt.distributed.buckets import ROW, Bucket, Named, flat_rows, in_buckets, in_equal_buckets
from nanogpt.engine.base import Batch, Compilation, EngineOptions
from nanogpt.engine.single import SingleEngine
from nanogpt.optim.muon import MatrixStretch, MuonAdamW, can_share_whole, is_matrix
from nanogpt.optim.optimizer import l2_norm
from nanogpt.storage.checkpoint import CheckpointReader, Piece


class ShardedEngine(SingleEngine):
    """Whole weights and gradients on each rank, in fp32; of the optimizer's state, and of any average, a part.

    After a step in bf16 the matrices of the blocks are exact in this rank's chunks alone. Elsewhere they are rounded to
    bf16, which is how a forward sees all of them.
    """

    name = "sharded"
    gathers_weights = True

    def forward_backward(self, batch: Batch, *, is_last: bool) -> None:
        self._next = 0 if is_last else len(self._buckets)  # the bucket that is reduced next
        self._incomplete = [len(bucket.parameters) for bucket in self._buckets]
        super().forward_backward(batch, is_last=is_last)

    def exposed_communication_s(self) -> float | None:
        return self._waited_s if self.world.device.type == "cpu" else None  # a GPU waits where no host sees it

    def local_weights(self) -> list[Tensor]:
        return [bucket.chunk for bucket in self._buckets]

    def weights_written(self) -> None:
        self._gather(exactly=True)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        self._gather(exactly=True)
        return super().weights()

    def _gather(self, *, exactly: bool) -> None:
        for bucket in self._buckets:
            bucket.gather(exactly=exactly)
        for bucket in self._buckets:
            bucket.gathered()

    def restore(self, checkpoint: CheckpointReader, *, updates: int) -> None:
        super().restore(checkpoint, updates=updates)
        self.weights_written()

    def pieces_like_weights(self, kind: str, tensors: Sequence[Tensor | None]) -> Iterator[Piece]:
        for bucket, tensor in zip(self._buckets, tensors, strict=True):
            for one in bucket.stretches() if tensor is not None else ():
                assert tensor is not None
                yield Piece(f"{kind}/{one.name}", one.start, tensor.detach()[one.at : one.at + one.length])

    @torch.no_grad()
    def read_like_weights(self, kind: str, tensors: Sequence[Tensor | None], checkpoint: CheckpointReader) -> None:
        for bucket, tensor in zip(self._buckets, tensors, strict=True):
            for one in bucket.stretches() if tensor is not None else ():
                assert tensor is not None
                values = checkpoint.read(f"{kind}/{one.name}", one.start, one.start + one.length)
                tensor[one.at : one.at + one.length].copy_(values)

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        # Each rank holds a part of the rest; the weights that are gathered from the parts must be alike.
        return ((f"weight/{name}", values) for bucket in self._buckets for name, values in bucket.seen_weights)

    def replicas_like_weights(self, kind: str, tensors: Sequence[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def _compile(self, options: EngineOptions) -> Compilation:
        compilation = super()._compile(options)  # which throws away the gradients that it makes
        self._share_out(options)
        return compilation

    def _share_out(self, options: EngineOptions) -> None:
        """Move the parameters into buckets, and give the optimizer this rank's chunks in their place."""
        named = list(self.model.named_parameters())
        muon = self.optimizer if isinstance(self.optimizer, MuonAdamW) else None
        whole = muon is not None and self._has_whole_matrices(muon)
        # Where a gradient that was made in bf16 is still a bf16 number when it is sent, and the sum of them is not.
        is_exact = self.world.local_size == self.world.size and self.world.max(len(options.micro_batches)) == (1,)
        gradient_dtype = (
            torch.bfloat16 if options.gradient_compression == "bf16" else None if is_exact else torch.float32
        )
        buckets: list[Bucket] = []
        for group in self.optimizer.param_groups:
            members = set(group["params"])
            of_group = [each for each in reversed(named) if each[1] in members]  # as a backward completes them
            as_matrices = whole and bool(group["orthogonal"])
            made = [*self._buckets_of(of_group, options.dtype, gradient_dtype, as_matrices=as_matrices)]
            group["params"] = [bucket.chunk for bucket in made]
            buckets += made
        place = {name: i for i, (name, _) in enumerate(named)}
        self._buckets = sorted(buckets, key=lambda bucket: -min(place[name] for name, _ in bucket.parameters))
        if muon is not None:
            stretches = list(self._matrix_stretches(muon))  # where they are for good, so not looked for at each step
            muon.shard(lambda: stretches, whole=whole)
        self._waited_s = 0.0  # for other ranks, in the newest step
        for i, bucket in enumerate(self._buckets):
            for _, parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._complete, i))

    def _buckets_of(
        self, named: Sequence[Named], dtype: str, gradient_dtype: torch.dtype | None, *, as_matrices: bool
    ) -> Iterator[Bucket]:
        """gradient_dtype: None: what the backward makes. as_matrices: with whole ones in each rank's chunks."""
        for seen_in in (torch.bfloat16, torch.float32):  # by the forward, and its gradient made by the backward
            chosen = [each for each in named if (dtype == "bf16" and is_matrix(*each)) == (seen_in == torch.bfloat16)]
            for each in (in_equal_buckets if as_matrices else in_buckets)(chosen, self.world):
                yield Bucket(
                    each, self.world, unit=each[0][1].numel() if as_matrices else ROW,
                    gradient_dtype=gradient_dtype or seen_in, weight_dtype=seen_in,
                )  # fmt: skip

    def _has_whole_matrices(self, muon: MuonAdamW) -> bool:
        """Whether each rank is given whole ones, of every shape."""
        counts = Counter(matrix.shape for matrix in muon.matrices).values()
        return all(can_share_whole(count, self.world.size) for count in counts)

    def _matrix_stretches(self, muon: MuonAdamW) -> Iterator[MatrixStretch]:
        """Of Muon's matrices, what this rank's chunks hold."""
        numbers = {matrix: i for i, matrix in enumerate(muon.matrices)}
        for bucket in self._buckets:
            of_name = dict(bucket.parameters)
            for one in bucket.stretches():
                if (number := numbers.get(of_name[one.name])) is not None:
                    yield MatrixStretch(number, one.start, bucket.chunk, one.at, one.length)

    def _complete(self, bucket: int, _: Tensor) -> None:
        """A gradient is: reduce its bucket once all of them are, in the same order on every rank."""
        self._incomplete[bucket] -= 1
        while self._next < len(self._buckets) and not self._incomplete[self._next]:
            self._buckets[self._next].reduce()
            self._next += 1

    def _sum_up(self, figures: Tensor) -> Tensor:
        started = time.perf_counter()
        for bucket in self._buckets:
            bucket.reduced()
        self._waited_s = time.perf_counter() - started
        norm = l2_norm([flat_rows(bucket.chunk_gradient) for bucket in self._buckets])
        own = torch.stack([norm.square().to(figures.dtype), self._loss_sum.to(figures.dtype)])
        sums = self._all_reduce(torch.cat([own, figures]))
        self._waited_s += self._summing_s
        sums[0].sqrt_()
        return sums

    def _update(self, sums: Tensor) -> None:
        super()._update(sums)
        started = time.perf_counter()
        self._gather(exactly=False)
        self._waited_s += time.perf_counter() - started

    def _clear_gradient(self) -> None:
        for bucket in self._buckets:
            bucket.gradients.zero_()
