"""What collectives cost, as a latency and a bandwidth: the alpha-beta model, its fit, and the step times it predicts.

A message of n bytes costs alpha + n / beta. An all-reduce round a ring of N sends 2 (N - 1) messages of n / N bytes
after one another; along a tree, pipelined, 2 ceil(log2 N) latencies and the bytes twice (Thakur, Rabenseifner and
Gropp, "Optimization of Collective Communication Operations in MPICH", 2005). A reduce-scatter or an all-gather is half
a ring.
"""

from dataclasses import dataclass
from math import ceil, log2

import numpy as np

from nanogpt.distributed.buckets import CHUNK_BYTES

FP32, BF16 = 4, 2  # bytes
DDP_BUCKET_BYTES = 25 * 2**20  # its default
ZERO_BUCKET_BYTES = int(5e7) * FP32  # as ds_config.json has it
SHARDED, DDP = "sharded", "DDP"
SUMS_BYTES = 5 * 8  # of the norm, the loss and three figures, in double precision
BACKWARD_SHARE = 2 / 3  # of a step's computing: two of three products of every weight


@dataclass(frozen=True)
class Link:
    """What joins the ranks."""

    alpha_s: float  # latency of a message
    bytes_per_s: float  # beta: what a rank can send while it receives as much

    def ring_s(self, nbytes: float, ranks: int) -> float:
        """Seconds of an all-reduce of nbytes round a ring."""
        return 2 * (ranks - 1) * (self.alpha_s + nbytes / ranks / self.bytes_per_s)

    def all_reduce_s(self, nbytes: float, ranks: int) -> float:
        """The same by ring or tree, whichever takes less time, as NCCL chooses."""
        tree_s = 2 * ceil(log2(ranks)) * self.alpha_s + 2 * nbytes / self.bytes_per_s
        return min(self.ring_s(nbytes, ranks), tree_s)


def fit_link(measured: dict[int, dict[int, float]]) -> Link:
    """The link that explains measured[ranks][nbytes], seconds of all-reduces round a ring, best in relative terms."""
    rows, seconds = [], []
    for ranks, by_size in measured.items():
        for nbytes, s in by_size.items():
            rows.append([2 * (ranks - 1), 2 * (ranks - 1) / ranks * nbytes])
            seconds.append(s)
    # Least squares of (prediction / measurement - 1): a latency counts as much as a bandwidth.
    weighted = np.array(rows) / np.array(seconds)[:, None]
    alpha_s, s_per_byte = np.linalg.lstsq(weighted, np.ones(len(seconds)), rcond=None)[0]
    return Link(max(alpha_s, 0.0), 1 / s_per_byte)


def step_s(
    strategy: str,
    *,
    parameters: int,
    largest_parameter: int,
    compute_s: float,
    ranks: int,
    link: Link,
    update_s: float = 0.0,
    in_bf16: int = 0,
    is_one_node: bool = True,
) -> float:
    """Seconds of a step of 'DDP', 'sharded', 'ZeRO 1', 'ZeRO 2' or 'ZeRO 3', of which one rank computes for compute_s.

    Gradients travel in buckets, each with its latencies, while the backward goes on, all but the last: the tied token
    embedding, the largest parameter, has its gradient only when the backward is over, and no bucket is less than a
    parameter. Then a few figures are summed. sharded, ZeRO 1 and 2 send the new weights after the update, with nothing
    to hide behind; ZeRO 3 gathers them in the forward and again in the backward, hidden as far as those last
    (Rajbhandari et al., arXiv 1910.02054). Everything is sent in fp32. update_s: of compute_s, what sharded shares out
    over the ranks; in_bf16: of the parameters, the blocks' matrices that sharded gathers in bf16, in buckets of their
    own; in one node their gradients go in it too, by an all-to-all, in which a rank sends as much as in a
    reduce-scatter.
    """
    if ranks == 1:
        return compute_s
    bucket_bytes = {DDP: DDP_BUCKET_BYTES, SHARDED: ranks * CHUNK_BYTES}.get(strategy, ZERO_BUCKET_BYTES)
    last_bytes = min(FP32 * parameters, max(FP32 * largest_parameter, bucket_bytes))
    if in_bf16 and strategy == SHARDED:
        last_bytes = FP32 * (parameters - in_bf16)
    rest_bytes = FP32 * parameters - last_bytes
    buckets = ceil(rest_bytes / bucket_bytes)
    each_bytes = rest_bytes / max(1, buckets)
    computing_s = compute_s + link.all_reduce_s(SUMS_BYTES, ranks)
    backward_s = BACKWARD_SHARE * (compute_s - update_s)
    if strategy == DDP:
        rest_s = buckets * link.all_reduce_s(each_bytes, ranks)
        return computing_s + max(0.0, rest_s - backward_s) + link.all_reduce_s(last_bytes, ranks)
    rest_s, last_s = buckets * link.ring_s(each_bytes, ranks) / 2, link.ring_s(last_bytes, ranks) / 2
    gather_s = rest_s + last_s
    if in_bf16 and strategy == SHARDED:
        halved_s = buckets * link.ring_s(each_bytes * BF16 / FP32, ranks) / 2
        gather_s, rest_s = halved_s + last_s, halved_s if is_one_node else rest_s
    if strategy in (SHARDED, "ZeRO 1", "ZeRO 2"):
        saved_s = update_s * (1 - 1 / ranks) if strategy == SHARDED else 0.0
        return computing_s - saved_s + max(0.0, rest_s - backward_s) + last_s + gather_s
    forward_s = compute_s - backward_s
    return computing_s + max(0.0, gather_s - forward_s) + max(0.0, gather_s + rest_s - backward_s) + last_s
