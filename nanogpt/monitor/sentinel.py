"""Looks, while a run goes on, whether its ranks still hold the same and compute the same.

sentinel = Sentinel(engine, replicas, config, phases, step=0)
with sentinel.listening(step):                      # around the step's forwards and backwards
    ...
sentinel.check_gradient(step, batch_of)             # before its update
sentinel.compare_replicas(step)                     # after it; both raise ReplicaError on every rank

After an all-reduce all replicas share an error of one rank's gradient, and stay alike. So now and then each rank
computes the micro-batch of the rank before it again, from the same weights, and the two gradients are compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from socket import gethostname

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanogpt.config.errors import ReplicaError
from nanogpt.config.train_config import ResolvedConfig
from nanogpt.distributed.replicas import Replicas
from nanogpt.engine import Batch, Engine
from nanogpt.utils.format import counted
from nanogpt.utils.phases import Phases

SUMS = 8  # of a gradient's values, each of every eighth column
# How far two sketches of one gradient may be apart, as a share of its norm: six times the worst that kernels for AVX2
# and for no vectors at all differed by in bf16, and more in fp32. On like hardware they were the same bit for bit
# (benchmarks/LOG.md).
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
LEAST = 1e-3  # of the whole gradient's norm, that counts as a parameter's: one near zero is all rounding


class Sentinel:
    """One rank's. Every rank must build it and call every method; alone it does nothing."""

    def __init__(
        self, engine: Engine, replicas: Replicas, config: ResolvedConfig, phases: Phases, *, step: int
    ) -> None:
        """phases: which hear of what is done. step: the newest when this is built."""
        self._engine, self._world, self._replicas = engine, engine.world, replicas
        self._replicas_every, self._gradients_every = config.replica_check_every, config.gradient_check_every
        self._phases, self._tolerance = phases, TOLERANCE["bf16" if config.head_dtype == "fp8" else config.dtype]
        self._hosts = self._world.gather(gethostname())
        self._names = [name for name, _ in engine.model.named_parameters()]
        self._heard: dict[str, Tensor] = {}  # sketches of the newest micro-batch's gradient
        self._right_step = step  # the newest whose gradients were compared, or the first

    def compare_replicas(self, step: int) -> None:
        """Raises ReplicaError where the ranks hold unlike values, if step is one at which they are compared.

        Not where each update overwrites them: what is wrong is gone by then, or everywhere.
        """
        if _is_due(step, self._replicas_every) and not self._engine.gathers_weights:
            with self._phases("comparing replicas", step):
                self._replicas.check(step)

    @contextmanager
    def listening(self, step: int) -> Iterator[None]:
        """Take note, inside, of the gradient of each micro-batch on its way, if step's is to be checked."""
        if not (self._checks_gradient(step) and self._engine.is_heard):
            yield
            return
        with self._hearing(self._take_note):
            yield

    def check_gradient(self, step: int, batch_of: Callable[[int], Batch]) -> None:
        """Raises ReplicaError where a rank computes another gradient than its neighbour, if step's is to be checked.

        batch_of: the last micro-batch of a rank in this step. Of a step that is compiled, or a CUDA graph, where nobody
        hears the gradient, the first window is computed twice, without either.
        """
        if self._checks_gradient(step):
            with self._phases("checking a gradient", step):
                self._check_gradient(step, batch_of)
            self._right_step = step

    def _check_gradient(self, step: int, batch_of: Callable[[int], Batch]) -> None:
        world, is_heard = self._world, self._engine.is_heard
        part = batch_of if is_heard else lambda rank: _one_window(batch_of(rank))
        own = self._sketches() if is_heard else self._compute(part(world.rank))
        again = self._compute(part((world.rank - 1) % world.size))
        found = self._gather(torch.stack([own, again]))  # (ranks, 2, parameters, SUMS + 1)
        pairs = [(found[owner, 0], found[(owner + 1) % world.size, 1]) for owner in range(world.size)]
        offs = [distance(*pair, self._tolerance) for pair in pairs]
        # Ranks on other CPUs may round the last bit of it otherwise, and all must decide alike.
        for owner, most in enumerate(world.max(*(off.max().item() for off in offs))):
            if most > 1:
                who = self._who(owner, *pairs[owner], part(owner))
                raise ReplicaError(self._describe(step, offs[owner], who))

    def _checks_gradient(self, step: int) -> bool:
        return self._world.size > 1 and self._engine.can_compute_apart and _is_due(step, self._gradients_every)

    def _who(self, owner: int, mine: Tensor, theirs: Tensor, batch: Batch) -> list[int]:
        """The ranks that are wrong of a gradient's owner and the one after it, or of all: as most compute it anew.

        mine, theirs: what these two have found, (parameters, SUMS + 1). Without a majority both.
        """
        pair = {owner: mine, (owner + 1) % self._world.size: theirs}
        anew = self._gather(self._compute(batch))  # (ranks, parameters, SUMS + 1)
        usual = anew.nanmedian(dim=0).values
        strays = [rank for rank, one in enumerate(anew) if distance(one, usual, self._tolerance).max() > 1]
        if 2 * len(strays) >= self._world.size:
            return sorted(pair)
        found = {rank for rank, one in pair.items() if distance(one, usual, self._tolerance).max() > 1}
        return sorted(found.union(strays)) or sorted(pair)

    def _describe(self, step: int, off: Tensor, ranks: list[int]) -> str:
        """off: how many tolerances the two sketches of each parameter are apart, (parameters,)."""
        worst, more = int(off.argmax()), int((off > 1).sum()) - 1
        who = ", ".join(f"{rank} on {self._hosts[rank]}" for rank in ranks)
        verb = f"rank{'s' * (len(ranks) > 1)} {who} compute{'s' * (len(ranks) == 1)} another"
        also = f" (and {counted(more, 'more tensor')})" if more else ""
        return (
            f"the ranks no longer compute the same: {verb} gradient of {self._names[worst]}{also}, by "
            f"{off[worst].item() * self._tolerance:.1e} of its norm, in step {step}, from the same weights and "
            f"windows; it was not applied, but of the steps after {self._right_step} no other was checked: without "
            f"that hardware, the same command goes on from the newest checkpoint, --resume=PATH from an older one"
        )

    def _compute(self, batch: Batch) -> Tensor:
        """A gradient, computed beside the step's -> its sketches, (parameters, SUMS + 1)."""
        with self._hearing(self._take_note_alone):
            torch.autograd.grad(self._engine.loss_apart(batch), list(self._engine.model.parameters()))
        return self._sketches()

    @contextmanager
    def _hearing(self, hook: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
        parameters = self._engine.model.named_parameters()
        handles = [parameter.register_hook(partial(hook, name)) for name, parameter in parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take_note(self, name: str, gradient: Tensor) -> None:
        self._heard[name] = sketch(gradient)

    def _take_note_alone(self, name: str, gradient: Tensor) -> Tensor:
        """In place of the gradient, which is not wanted: zeros that take no memory."""
        self._take_note(name, gradient)
        return gradient.new_zeros(()).expand_as(gradient)

    def _sketches(self) -> Tensor:
        heard, self._heard = self._heard, {}
        return torch.stack([heard[name] for name in self._names])

    def _gather(self, share: Tensor) -> Tensor:
        """share of every rank, (ranks, ...), on the CPU."""
        values = share.new_empty(self._world.size, *share.shape)
        self._world.all_gather(share, values.view(-1, *share.shape[1:]))
        return values.cpu()


def sketch(gradient: Tensor) -> Tensor:
    """(SUMS + 1,) in fp32: sums of its values with random signs, those of a row and of a column, and its norm.

    Rounding errors add up in them as in the values, so that the distance of two sketches tells that of two gradients;
    one wrong value changes one sum by as much. Without the signs what a LayerNorm or a softmax makes of a gradient,
    whose values add up to zero, would have no sums.
    """
    rows = gradient.detach().float().reshape(-1, gradient.size(-1))
    signed = (_signs(len(rows), 0, rows.device) @ rows) * _signs(rows.size(1), 1, rows.device)
    sums = pad(signed, (0, -len(signed) % SUMS)).view(-1, SUMS).sum(dim=0)
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1))  # one sum over millions loses too much
    return torch.cat([sums, norm[None]])


@cache
def _signs(count: int, seed: int, device: torch.device) -> Tensor:
    """1 or -1, (count,), the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, (count,), generator=generator) - 1).to(device, torch.float32)


def distance(one: Tensor, other: Tensor, tolerance: float) -> Tensor:
    """Of sketches, (parameters, SUMS + 1) each, in tolerances, (parameters,).

    0 where neither is finite: such a step is refused by its norm.
    """
    norms = torch.maximum(one[:, -1], other[:, -1])
    allowed = tolerance * (norms + LEAST * torch.linalg.vector_norm(norms)).clamp(min=1e-30)
    sums, norm = one.sub(other).split([SUMS, 1], dim=1)
    apart = torch.maximum(torch.linalg.vector_norm(sums, dim=1), norm[:, 0].abs()) / allowed
    finite = [each.isfinite().all(dim=1) for each in (one, other)]
    unlike = torch.where(finite[0] == finite[1], 0.0, torch.inf)
    return torch.where(finite[0] & finite[1], apart, unlike)


def _one_window(batch: Batch) -> Batch:
    return Batch(batch.idx[:1], batch.targets[:1], batch.step_tokens)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
