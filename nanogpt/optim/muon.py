"""Muon for the blocks' matrices, AdamW for all other weights, the positions' at a rate of their own, as one optimizer.

optimizer = MuonAdamW(model, world, dtype="bf16")

Muon's update is the momentum of a matrix with its singular values brought near one (Jordan et al., "Muon", 2024), by
Newton-Schulz iterations that would cost as much as the training step itself. Here they cost less:

- Some 256 channels of the residual stream, rows or columns of a matrix, are orthogonalised together, as if they were a
  parameter of their own. So the singular values of these are near one, those of the whole matrix less so
  (docs/explanation/fast-recipe.md has what that costs in steps).
- No rank repeats another's work. Matrices of one shape are stacked, each rank takes its share of the stack, and all
  ranks get the results.

An iteration is x <- (a + b R + c R^2) x with R = x x^T. All these factors are polynomials of the first R: so only that
one is a product of the wide x, the next follow from it, and x is multiplied once, by the product of the factors.
torch.optim.Muon multiplies the wide x twice in each of five iterations, one matrix after the other, on every rank.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import isqrt, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.distributed.world import World
from nanogpt.optim.adamw import AdamW, Optimizer

MOMENTUM, BUFFER = 0.95, "momentum_buffer"  # torch's name for it
MULTIPLE = "lr_multiple"  # of a parameter group
# x Muon's rate. Hot positions leave more memory at the same loss (docs/explanation/fast-recipe.md)
POSITIONS, POSITIONS_RATE, ADAMW_RATE = "transformer.wpe.weight", 16.0, 0.6
# a, b, c of each iteration: in three they bring values from 0.01 to 1 nearest to one, with one per cent to spare (Amsel
# et al., "The Polar Express", arXiv 2505.16932). More would not do: the least eigenvalues of R, which bf16 leaves a
# little negative, would grow.
COEFFICIENTS = ((7.9103, -22.0792, 15.8692), (3.6073, -2.6467, 0.5110), (2.6713, -1.9853, 0.4535))
CHANNELS = 256  # of the residual stream that are orthogonalised together, or about as many
HEADROOM = 1.05  # of R below its bound: past it the polynomials are steep, and rounding reaches there
RMS = 0.2  # of an update, whatever the matrix's shape, about what AdamW's is (Liu et al., arXiv 2502.16982)
SMALLEST_NORM = 1e-7  # of a gradient that is told from none


@dataclass(frozen=True)
class MatrixStretch:
    """Values of a matrix that this rank updates: all of it, or what a sharding engine has left here."""

    matrix: int  # which of MuonAdamW's matrices
    start: int  # of its flattened values
    parameter: Tensor  # what the optimizer steps: the matrix itself, or a flat tensor that holds some of it
    at: int  # where in the flattened parameter
    length: int


class MuonAdamW(Optimizer):
    """Three parameter groups: AdamW's weights but for the learned positions, these, and the matrices of the blocks.

    channels: how many of a matrix are orthogonalised together. An engine that puts flat tensors in the groups' place
    says with shard what they hold. Every rank must call step.
    """

    def __init__(self, model: nn.Module, world: World, *, betas: tuple[float, float], dtype: str) -> None:
        """dtype: 'bf16' or 'fp32', what the Newton-Schulz iterations compute in."""
        named = dict(model.named_parameters())
        self.matrices = [named.pop(name) for name, p in list(named.items()) if is_matrix(name, p)]
        positions = [named.pop(POSITIONS)]
        self.channels = channels_together(positions[0].size(-1))
        groups = [{"params": [*named.values()], MULTIPLE: ADAMW_RATE}, {"params": positions, MULTIPLE: POSITIONS_RATE}]
        self._adamw = AdamW(groups, betas=betas, weight_decay=0.0, fused=True)
        super().__init__(
            [*self._adamw.param_groups, {"params": self.matrices, "orthogonal": True}],
            {"lr": 0.0, "orthogonal": False},
        )
        self._adamw.state = self.state
        self._world = world
        self._dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._shapes = [p.shape for p in self.matrices]  # a sharding engine may empty the matrices
        self._replicated = True
        self.find_stretches: Callable[[], Iterable[MatrixStretch]] = lambda: [
            MatrixStretch(i, 0, matrix, 0, matrix.numel()) for i, matrix in enumerate(self.matrices)
        ]

    @property
    def found_inf(self) -> Tensor | None:
        """1, (), on the device, where the next step is to change nothing, as torch's gradient scaler says it."""
        return getattr(self._adamw, "found_inf", None)

    @found_inf.setter
    def found_inf(self, refused: Tensor) -> None:
        self._adamw.found_inf = refused  # type: ignore[attr-defined]

    def shard(self, find_stretches: Callable[[], Iterable[MatrixStretch]], *, whole: bool = False) -> None:
        """From now on the ranks hold stretches of the matrices, each value on one rank.

        whole: each stretch is a whole matrix, so that no rank needs another's.
        """
        self._replicated, self.find_stretches = False, find_stretches
        if whole:
            self._world = replace(self._world, rank=0, size=1)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here evaluates the loss anew
        for group in self.param_groups:  # DeepSpeed shows one group at a time
            if group["orthogonal"]:
                self._step_matrices(group)
            else:
                self._adamw.param_groups = [group]
                self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        stretches = list(self.find_stretches())
        numbers = range(len(self._shapes)) if self._world.size > 1 else sorted({s.matrix for s in stretches})
        if not (parameters := group["params"]) or not numbers:  # a model without blocks, or none for this rank
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter][BUFFER] = torch.zeros_like(parameter)
        gradients, momenta = [p.grad for p in parameters], [self.state[p][BUFFER] for p in parameters]
        refused = None if self.found_inf is None else self.found_inf.bool()
        if refused is not None:  # a momentum that moves towards itself stays as it is, bit for bit
            gradients = [torch.where(refused, m, g) for g, m in zip(gradients, momenta, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)  # Nesterov's direction, in the place of what was used up
        directions = dict(zip(parameters, gradients, strict=True))
        shapes = list(dict.fromkeys(self._shapes[i] for i in numbers))  # in the same order on every rank
        members = [[i for i in numbers if self._shapes[i] == shape] for shape in shapes]
        mine = [[s for s in stretches if s.matrix in of_shape] for of_shape in members]
        stacks = [self._stacked(m, s, directions) for m, s in zip(members, mine, strict=True)]
        for shape, m, s, updates in zip(shapes, members, mine, self._orthogonal(stacks), strict=True):
            rate = -RMS * sqrt(max(shape)) * group["lr"]
            if refused is not None:
                updates.mul_(torch.where(refused, 0.0, rate))
                rate = 1.0
            if s:  # a sharding engine may have left none
                weights = [one.parameter.view(-1)[one.at : one.at + one.length] for one in s]
                torch._foreach_add_(weights, [_stretch_of(updates, m, one) for one in s], alpha=rate)

    def _stacked(
        self, members: Sequence[int], stretches: Sequence[MatrixStretch], directions: dict[Tensor, Tensor]
    ) -> Tensor:
        """The directions of the matrices of one shape, (len(members) or more, rows, columns), on every rank."""
        device = next(iter(directions.values())).device
        depth = stack_depth(len(members), self._world.size)
        stack = torch.zeros(depth, *self._shapes[members[0]], device=device, dtype=self._dtype)
        if stretches:
            torch._foreach_copy_(
                [_stretch_of(stack, members, s) for s in stretches],
                [directions[s.parameter].view(-1)[s.at : s.at + s.length] for s in stretches],
            )
        if not self._replicated:
            self._world.sum_tensor(stack)  # exact: each value is zero on all ranks but one
        return stack

    def _orthogonal(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Each matrix of the stacks orthogonalised, self.channels of it together, by one of the ranks."""
        mine = [self._world.rows(len(stack)) for stack in stacks]
        found = orthogonalise([stack[rows] for stack, rows in zip(stacks, mine, strict=True)], self.channels)
        if self._world.size == 1:
            return found
        for stack, rows, share in zip(stacks, mine, found, strict=True):
            if len(stack) % self._world.size == 0:
                self._world.all_gather(share, stack)
            else:
                stack.zero_()[rows] = share
                self._world.sum_tensor(stack)  # exact: each value is zero on all ranks but one
        return list(stacks)


def stack_depth(members: int, world_size: int) -> int:
    """How many matrices the stack of so many of one shape holds: padded to equal shares, where that sends less.

    Equal shares are gathered; of many ranks most would have nothing but padding. Unequal ones are summed, which sends
    the stack twice.
    """
    padded = -(-members // world_size) * world_size
    return padded if padded <= 2 * members else members


def can_share_whole(members: int, world_size: int) -> bool:
    """Whether so many matrices of one shape are shared out whole, in equal shares with at most as much padding."""
    return stack_depth(members, world_size) % world_size == 0


def _stretch_of(stack: Tensor, members: Sequence[int], stretch: MatrixStretch) -> Tensor:
    """Where a stretch's values are in the stack of the matrices called members."""
    return stack[members.index(stretch.matrix)].view(-1)[stretch.start : stretch.start + stretch.length]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter of a GPT: a block's 2-D weight; embeddings are looked up, not multiplied."""
    return ".h." in name and parameter.ndim == 2


def channels_together(width: int) -> int:
    """How many of a model's channels are orthogonalised together: the divisor of its width next to 256, in ratio."""
    lesser = [channels for channels in range(1, isqrt(width) + 1) if width % channels == 0]
    divisors = sorted({*lesser, *(width // channels for channels in lesser)})
    return min(divisors, key=lambda channels: max(channels / CHANNELS, CHANNELS / channels))


def orthogonalise(stacks: Sequence[Tensor], channels: int) -> list[Tensor]:
    """The matrices of stacks (n, rows, columns) with the singular values s of each group near one, its vectors kept.

    A group is `channels` rows of a matrix, or columns where there are fewer of these; channels divides their number.
    Values above a hundredth of (sum of s^4)^(1/4), which is no less than the largest, end between 0.69 and 1.3; lesser
    ones are raised by no more than that one is.
    """
    groups = [_groups(stack, channels) for stack in stacks]
    grams = torch.cat([x @ x.mT for x in groups])  # of all shapes together
    scales = HEADROOM * torch.linalg.matrix_norm(grams, keepdim=True).clamp(min=SMALLEST_NORM**2)
    p, rest = _product_of_factors(grams / scales)
    lengths = [len(x) for x in groups]
    found = []
    for stack, x, part, scale in zip(stacks, groups, rest.split(lengths), scales.split(lengths), strict=True):
        if _is_tall(stack):
            y = torch.baddbmm(x.mT, x.mT, part.mT, beta=p).mul_(scale.rsqrt())  # (groups, the longer side, channels)
            pieces = y.view(len(stack), stack.size(-1) // channels, *y.shape[1:])
            found.append(pieces.transpose(1, 2).reshape(stack.shape))
        else:
            found.append(torch.baddbmm(x, part, x, beta=p).mul_(scale.rsqrt()).view(stack.shape))
    return found


def _groups(stack: Tensor, channels: int) -> Tensor:
    """The groups of all matrices of a stack, (groups, channels, the longer side)."""
    if not _is_tall(stack):
        return stack.view(-1, channels, stack.size(-1))
    # Whole pieces of rows are copied, and seen as columns: to turn a matrix over takes a CPU as long as a product.
    pieces = stack.view(len(stack), stack.size(-2), stack.size(-1) // channels, channels)
    return pieces.transpose(1, 2).flatten(0, 1).mT


def _is_tall(stack: Tensor) -> bool:
    return stack.size(-2) > stack.size(-1)


def _product_of_factors(gram: Tensor) -> tuple[float, Tensor]:
    """Of the iterations on a normalised gram matrix (n, side, side), as p and R: the product is p I + R."""
    # A factor is a I + f, their product p I + rest: bf16 would lose the small eigenvalues of a sum beside its diagonal.
    p, rest = 1.0, None  # type: float, Tensor | None
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        f = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        rest = f if rest is None else torch.baddbmm(torch.add(a * rest, f, alpha=p), f, rest)
        p *= a
        if i + 1 < len(COEFFICIENTS):
            half = torch.baddbmm(gram, f, gram, beta=a)
            gram = torch.baddbmm(half, half, f, beta=a)
    assert rest is not None
    return p, rest
