"""Do the ranks compute alike, and hold alike what each of them holds whole?

    replicas = Replicas(world, held)    # held(): (name, tensor) of weights, moments and average, on every rank
    replicas.check(step=120)            # raises ReplicaError on every rank

A full pass averages the ranks' losses, a checkpoint takes a share of each rank, and the weights that are saved are the
first rank's. All three are true only as long as the ranks hold the same. An all-reduce does not keep them so: it gives
every rank the same gradient, and a replica that has gone its own way takes it further.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from math import inf, sqrt
from statistics import median_low

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanogpt.config.errors import ReplicaError
from nanogpt.distributed.world import World
from nanogpt.utils.format import counted

MOST_NAMED = 8  # ranks in a line
# Of the largest value of a tensor, one rounding. Updates round anew each step, either way, so that the sum of n values
# strays with the root of n x steps. Kernels for AVX2 and for no vectors at all took 3 % of this in 50 to 1,600 steps.
ROUNDING = 2.0**-22
UNLIKE = (
    "the ranks run on different hardware, which rounds differently: they are compared within rounding, not bit for bit"
)


class Replicas:
    """One rank's. Every rank must build it and make every check."""

    def __init__(self, world: World, held: Callable[[], Iterable[tuple[str, Tensor]]], *, step: int) -> None:
        """held: what each rank holds whole, in the same order on every rank. step: the newest when this is built."""
        self._world, self._held = world, held
        self._agreed_step: int | None = None  # the newest at which all held the same
        self._first_step = step
        # A CPU's threads share a tensor out, and the ends of the shares may be computed by another kernel.
        threads = torch.get_num_threads() if world.device.type == "cpu" else 0
        hardware = world.gather((world.device_name(), torch.backends.cpu.get_cpu_capability(), threads))
        self.exact = len(set(hardware)) == 1  # unlike hardware may round an update otherwise

    def check(self, step: int) -> None:
        """Raises ReplicaError where the ranks hold unlike values: bit for bit, or beyond rounding on unlike hardware.

        A step at which they agreed is not looked at again.
        """
        if self._world.size == 1 or step == self._agreed_step:
            return
        differing = self._differing() if self.exact else self._differing_beyond_rounding(step - self._first_step)
        if differing:
            name, versions = differing[0]
            since = f"at step {step}" if self._agreed_step is None else f"between steps {self._agreed_step} and {step}"
            also = f" (and {counted(len(differing) - 1, 'more tensor')})" if len(differing) > 1 else ""
            raise ReplicaError(
                f"the ranks no longer hold the same values: {who_differs(versions)} in {name}{also}, {since}; nothing "
                f"was saved since, and the same command goes on from the newest checkpoint"
            )
        self._agreed_step = step

    def _differing(self) -> Sequence[tuple[str, Sequence[Hashable]]]:
        """(name, each rank's fingerprint) of what is unlike."""
        mine = fingerprints(self._held())
        if len(set(self._world.gather(hashlib.blake2b(b"".join(mine.values())).digest()))) == 1:
            return []
        ranks = self._world.gather(mine)
        return [(name, of) for name in mine if len(set(of := [prints[name] for prints in ranks])) > 1]

    def _differing_beyond_rounding(self, updates: int) -> Sequence[tuple[str, Sequence[Hashable]]]:
        """(name, the sum of a row on each rank, or None where it is the usual one) of what is unlike."""
        sums, allowed = {}, {}
        for name, values in self._held():
            rows = values.detach().reshape(-1, values.size(-1))
            sums[name] = rows.sum(dim=1, dtype=torch.float64)
            most = ROUNDING * sqrt(rows.size(1) * (1 + updates)) * rows.abs().max()
            allowed[name] = most.double().expand(len(rows))
        mine, slack = torch.cat([*sums.values()]), torch.cat([*allowed.values()])
        both = torch.stack([mine, -mine]).nan_to_num(nan=inf)  # a maximum may lose a NaN
        highest, minus_lowest, slack = self._world.max_tensor(torch.cat([both, slack[None]]))
        apart = ~(highest + minus_lowest <= slack)
        found = []
        for name, rows in zip(sums, apart.split([len(s) for s in sums.values()]), strict=True):
            if rows.any():
                row = int(rows.nonzero()[0])
                of = self._world.gather(sums[name][row].item())
                usual, limit = median_low(of), allowed[name][row].item()
                found.append((name, [None if abs(value - usual) <= limit else value for value in of]))
        return found


def who_differs(versions: Sequence[Hashable]) -> str:
    """Which ranks hold another version than most do; without a majority, all of them."""
    usual, count = Counter(versions).most_common(1)[0]
    ranks: Sequence[int]
    if 2 * count > len(versions):
        ranks = [rank for rank, version in enumerate(versions) if version != usual]
        verb = f"differ{'s' * (len(ranks) == 1)} from the other {count} ranks"
    else:
        ranks, verb = range(len(versions)), "do not all hold the same"
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:MOST_NAMED]))}{more} {verb}"


COLUMNS = 1024  # of the square that a tensor is laid out in, in words of two values


def fingerprint(values: Tensor) -> bytes:
    """16 bytes that tell values, of any shape and on any device, from others in any bit of their fp32 form.

    A hash of the sums of all rows and all columns of their bits, which the device makes at the speed of its memory:
    whole numbers, modulo 2^64, so they are the same in any order. Changes in up to three words always show; more would
    have to cancel in each row and each column.
    """
    return fingerprints([("", values)])[""]


def fingerprints(named: Iterable[tuple[str, Tensor]]) -> dict[str, bytes]:
    """The same of several, by their names. A GPU is waited for once."""
    sums = {name: _sums_of_bits(values) for name, values in named}
    parts = torch.cat([*sums.values()]).cpu().split([len(each) for each in sums.values()]) if sums else ()
    prints = (hashlib.blake2b(part.numpy().tobytes(), digest_size=16).digest() for part in parts)
    return dict(zip(sums, prints, strict=True))


def _sums_of_bits(values: Tensor) -> Tensor:
    """Of the square that values are laid out in: its rows, its columns, and the words that fill no row, whole."""
    flat = values.detach().float().reshape(-1)
    if flat.storage_offset() % 2:  # a word would be cut
        flat = flat.clone()
    whole = flat.numel() // (2 * COLUMNS) * (2 * COLUMNS)
    rest = pad(flat[whole:], (0, 2 * COLUMNS - (flat.numel() - whole)))
    rows = flat[:whole].view(torch.int64).view(-1, COLUMNS)
    return torch.cat([rows.sum(dim=1), rows.sum(dim=0), rest.view(torch.int64)])
