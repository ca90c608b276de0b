"""What collectives cost, as a latency and a bandwidth: the alpha-beta model, its fit, and the step times it predicts.

A message of n bytes costs alpha + n / beta. An all-reduce round a ring of N sends 2 (N - 1) messages of n / N bytes
after one another; along a tree, pipelined, 2 ceil(log2 N) latencies and the bytes twice (Thakur, Rabenseifner and
Gropp, "Optimization of Collective Communication Operations in MPICH", 2005). A reduce-scatter or an all-gather is half
a ring.
"""

from dataclasses import dataclass
from math import ceil, log2

import numpy as np

FP32 = 4  # bytes; the engines communicate gradients and weights in fp32
BUCKET_BYTES = 25 * 2**20  # of DDP: the last one can only be sent when the backward is over
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
        return min(self.ring_s(nbytes, ranks), tree_s) if ranks > 1 else 0.0


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


def step_s(strategy: str, *, parameters: int, compute_s: float, ranks: int, link: Link) -> float:
    """Seconds of a step of 'DDP', 'ZeRO 1', 'ZeRO 2' or 'ZeRO 3', of which a rank alone would compute for compute_s.

    Gradients travel while the backward goes on, all but the last bucket. ZeRO 1 and 2 send the new weights after the
    update, with nothing to hide behind; ZeRO 3 gathers them in the forward and again in the backward, hidden as far as
    those last (Rajbhandari et al., arXiv 1910.02054: 1.5 times DDP's bytes).
    """
    if ranks == 1:
        return compute_s
    nbytes = FP32 * parameters
    whole_s = link.all_reduce_s(nbytes, ranks)
    half_s = link.ring_s(nbytes, ranks) / 2
    last_s = link.all_reduce_s(min(nbytes, BUCKET_BYTES), ranks)
    backward_s = BACKWARD_SHARE * compute_s
    if strategy == "DDP":
        return compute_s + max(last_s, whole_s - backward_s)
    if strategy in ("ZeRO 1", "ZeRO 2"):
        return compute_s + max(last_s, half_s - backward_s) + half_s
    forward_s = compute_s - backward_s
    return compute_s + max(0.0, half_s - forward_s) + max(last_s, 2 * half_s - backward_s)
