"""Muon for the blocks' matrices, AdamW for all other weights, as one optimizer.

optimizer = MuonAdamW(model, world, dtype="bf16")

Muon's update is the momentum of a matrix with its singular values brought near one (Jordan et al., "Muon", 2024), by
Newton-Schulz iterations that cost more than the training step itself. So no rank repeats another's: matrices of one
shape are stacked, each rank takes its share of the stack, and all ranks get the results. torch.optim.Muon, which the
tests compare with, does one matrix after the other, on every rank.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nanogpt.world import World

MOMENTUM, BUFFER = 0.95, "momentum_buffer"  # torch's name for it
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, steepest at zero
RMS = 0.2  # of an update, whatever the matrix's shape, about what AdamW's is (Liu et al., arXiv 2502.16982)
SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class Stretch:
    """Values of a matrix that this rank updates: all of it, or what a sharding engine has left here."""

    matrix: int  # which of MuonAdamW's matrices
    start: int  # of its flattened values
    parameter: Tensor  # what the optimizer steps: the matrix itself, or a flat tensor that holds some of it
    at: int  # where in the flattened parameter
    length: int


class MuonAdamW(Optimizer):
    """Two parameter groups: the matrices of the blocks, whose rate is lr_ratio times the other's, and the rest.

    An engine that puts flat tensors in the groups' place says with shard what they hold. Every rank must
    call step.
    """

    def __init__(
        self, model: nn.Module, world: World, *, betas: tuple[float, float], lr_ratio: float, ns_steps: int, dtype: str
    ) -> None:
        """dtype: 'bf16' or 'fp32', what the Newton-Schulz iterations compute in."""
        named = list(model.named_parameters())
        self.matrices = [p for name, p in named if is_matrix(name, p)]
        rest = [p for name, p in named if not is_matrix(name, p)]
        self._adamw = AdamW(rest, betas=betas, weight_decay=0.0, fused=True)
        super().__init__(
            [self._adamw.param_groups[0], {"params": self.matrices, "lr_ratio": lr_ratio, "orthogonal": True}],
            {"lr": 0.0, "lr_ratio": 1.0, "orthogonal": False},
        )
        self._adamw.state = self.state
        self._world, self._ns_steps = world, ns_steps
        self._dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._shapes = [p.shape for p in self.matrices]  # a sharding engine may empty the matrices
        self._whole = True
        self.find_stretches: Callable[[], Sequence[Stretch]] = lambda: [
            Stretch(i, 0, matrix, 0, matrix.numel()) for i, matrix in enumerate(self.matrices)
        ]

    def shard(self, find_stretches: Callable[[], Sequence[Stretch]]) -> None:
        """From now on the ranks hold stretches of the matrices, each value on one rank."""
        self._whole, self.find_stretches = False, find_stretches

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:  # DeepSpeed shows one group at a time
            if group["orthogonal"]:
                self._step_matrices(group)
            else:
                self._adamw.param_groups = [group]
                self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        directions: dict[Tensor, Tensor] = {}
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state[BUFFER] = torch.zeros_like(parameter)
            momentum = state[BUFFER].lerp_(parameter.grad, 1 - MOMENTUM)
            directions[parameter] = parameter.grad.lerp(momentum, MOMENTUM)  # Nesterov's
        by_shape = defaultdict(list)
        for stretch in self.find_stretches():
            by_shape[self._shapes[stretch.matrix]].append(stretch)
        for shape in dict.fromkeys(self._shapes):  # in the same order on every rank
            members = [i for i, other in enumerate(self._shapes) if other == shape]
            updates = self._orthogonal(members, by_shape[shape], directions)
            for s in by_shape[shape]:
                update = updates[members.index(s.matrix)].view(-1)[s.start : s.start + s.length]
                s.parameter.view(-1)[s.at : s.at + s.length].add_(update, alpha=-group["lr"] * RMS * sqrt(max(shape)))

    def _orthogonal(
        self, members: Sequence[int], stretches: Sequence[Stretch], directions: dict[Tensor, Tensor]
    ) -> Tensor:
        """The orthogonalised directions of matrices of one shape, (len(members) or more, rows, columns)."""
        each = -(-len(members) // self._world.size)
        device = next(iter(directions.values())).device
        stack = torch.zeros(each * self._world.size, *self._shapes[members[0]], device=device, dtype=self._dtype)
        for s in stretches:
            into = stack[members.index(s.matrix)].view(-1)[s.start : s.start + s.length]
            into.copy_(directions[s.parameter].view(-1)[s.at : s.at + s.length])
        if self._world.size == 1:
            return orthogonalise(stack, self._ns_steps)
        if not self._whole:
            dist.all_reduce(stack)  # exact: each value is zero on all ranks but one
        mine = orthogonalise(stack[each * self._world.rank :][:each], self._ns_steps)
        dist.all_gather_into_tensor(stack, mine)
        return stack


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter of a GPT: a block's 2-D weight; embeddings are looked up, not multiplied."""
    return ".h." in name and parameter.ndim == 2


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    """Each matrix of x (n, rows, columns) with singular values in about 0.6 to 1.3 after 5 steps, the vectors kept."""
    a, b, c = COEFFICIENTS
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)  # the largest is at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()
