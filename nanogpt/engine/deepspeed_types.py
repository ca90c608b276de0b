"""What is used of DeepSpeed, which has no types of its own (0.19.8).

weights = cast(Sequence[ShardedParameter], list(model.parameters()))    # at stage 3
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer


class Fragment(Protocol):
    """A stretch of a flat tensor, in values."""

    start: int
    numel: int


class MasterMapping(Protocol):
    """At stages 1 and 2: where a parameter's values stand in the fp32 master weights of this rank."""

    param_group_index: int  # which of the flat masters
    hp_fragment_address: Fragment  # in that one
    lp_fragment_address: Fragment  # in the flattened parameter


class MappedParameter(Protocol):
    """A parameter at stages 1 and 2."""

    _hp_mapping: MasterMapping | None  # None: none of its values is this rank's


class ShardedParameter(Protocol):
    """A parameter at stage 3."""

    ds_tensor: Tensor  # this rank's part, (ceil(ds_numel / ranks),), the last ranks' with padding
    ds_numel: int  # values of the whole


class ParameterOffload(Protocol):
    """Gathers and lets go of the parameters at stage 3."""

    def partition_all_parameters(self) -> None: ...


class ZeroOptimizer(Protocol):
    """The optimizer that DeepSpeed builds around one of ours, from stage 1 on."""

    optimizer: Optimizer  # ours, which steps the flat masters
    single_partition_of_fp32_groups: list[Tensor]  # these, at stages 1 and 2
    fp32_partitioned_groups_flat: list[Tensor]  # and at stage 3, as what follows
    grad_position: Mapping[int, Sequence[int]]  # by parameter: which of them, where in it, how many values
    parameter_offload: ParameterOffload

    def get_param_id(self, parameter: nn.Parameter) -> int: ...


class Runtime(Protocol):
    """What deepspeed.initialize makes of a model."""

    def __call__(self, idx: Tensor, targets: Tensor, *, reduction: str) -> Tensor: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> object: ...

    def step(self) -> None: ...

    def get_global_grad_norm(self) -> float: ...

    def zero_grad(self) -> None: ...
