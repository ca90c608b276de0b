"""DeepSpeed: optimizer state, gradients and weights shared out over the ranks, as ZeRO's stage says.

Stage 0 shares out nothing, 1 the optimizer's state and fp32 master weights, 2 the gradients too, 3 the weights too
(Rajbhandari et al., arXiv 1910.02054). What the stage changes is inside here; the loop sees an Engine.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from math import isfinite
from typing import cast

import torch
from torch import Tensor, nn

from nanogpt.distributed.hardware import Stopwatch
from nanogpt.distributed.world import World
from nanogpt.engine.base import Batch, Compilation, Engine, EngineOptions, StepLosses, StepResult
from nanogpt.engine.compile import compile_model
from nanogpt.engine.deepspeed_config import LOGGING, import_deepspeed
from nanogpt.engine.deepspeed_types import MappedParameter, MasterMapping, Runtime, ShardedParameter, ZeroOptimizer
from nanogpt.engine.single import mean_share, replicated, replicated_pieces, restore_replicated
from nanogpt.model.gpt import GPT
from nanogpt.optim.muon import MatrixStretch, MuonAdamW
from nanogpt.optim.optimizer import MOMENTS, build_optimizer, gradient_norm, restored_state, set_learning_rate
from nanogpt.storage.checkpoint import CheckpointReader, Piece
from nanogpt.storage.report import ScoresPrecision


class DeepSpeedEngine(Engine):
    """A model that deepspeed.initialize has taken over."""

    name = "deepspeed"

    def __init__(self, model: GPT, world: World, options: EngineOptions) -> None:
        deepspeed = import_deepspeed(world.device.type)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it refuses to start without, even alone
        self.world = world
        settings = options.deepspeed
        assert settings is not None, "the plan has read them for this engine"
        self.stage: int = settings["zero_optimization"]["stage"]
        self.model = model.to(world.device)
        if options.compile and self.stage == 3:
            self.compilation = Compilation(self.model, failure="ZeRO 3 gathers weights in Python, between the layers")
        elif settings["bf16"]["enabled"]:
            self.model.bfloat16()  # as DeepSpeed will: what is compiled must be what is trained
            self.compilation = compile_model(self.model, world, replace(options, dtype="fp32"))  # without autocast
        else:
            self.compilation = compile_model(self.model, world, options)
        if settings.keys() & set(LOGGING):
            deepspeed.utils.logging.set_log_level_from_string("info")  # what these print is of that level
        self.deepspeed: Runtime
        self.optimizer: torch.optim.Optimizer
        self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
            model=self.compilation.forward,
            # By its very type DeepSpeed knows an optimizer that it was tested with.
            optimizer=build_optimizer(
                self.model, world, name=options.optimizer, dtype=options.dtype, adamw=torch.optim.AdamW
            ),
            config=dict(settings),
        )
        if self.stage > 0 and isinstance(muon := self._zero.optimizer, MuonAdamW):
            muon.shard(lambda: self._matrix_stretches(muon))
        if settings["bf16"]["enabled"]:
            self.scores_precision = ScoresPrecision.BF16_WEIGHTS
        elif self.stage == 3 and settings["torch_autocast"]["enabled"]:  # which gathers matrices in bf16
            self.scores_precision = ScoresPrecision.BF16
        self._autocasts: bool = settings["torch_autocast"]["enabled"]
        self.is_heard, self.gathers_weights = not self.compilation.compiled, self.stage > 0
        self.can_compute_apart = self.stage < 3  # where the backward lets go of weights that it gathers for a step
        self._gathered = deepspeed.zero.GatheredParameters
        self.losses = StepLosses()
        self._loss_sum = torch.zeros((), device=world.device)  # of this rank's rows in the step
        self._forward_watch = Stopwatch(world.device)
        if self.stage == 3:  # whose forward gathers weights: of the output layer the product alone
            head, watch = self.model.lm_head, self._forward_watch
            head.register_forward_pre_hook(lambda *_: watch.__enter__())  # after DeepSpeed's
            head.register_forward_hook(lambda *_: watch.__exit__(), prepend=True)  # before DeepSpeed's

    @property
    def _zero(self) -> ZeroOptimizer:
        """What the optimizer is from stage 1 on."""
        return cast(ZeroOptimizer, self.optimizer)

    def forward_backward(self, batch: Batch, *, is_last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        with nullcontext() if self.stage == 3 else self._forward_watch:
            losses = self.deepspeed(batch.idx, batch.targets, reduction="none")
        loss_sum = losses.sum()
        # DeepSpeed averages over the ranks; that it shall not also divide by the accumulation steps must be said.
        self.deepspeed.backward(mean_share(loss_sum, batch, float(self.world.size)), scale_wrt_gas=False)
        self._loss_sum += loss_sum.detach()
        self.losses.add(losses)

    def forward_s(self) -> float | None:
        return self._forward_watch.seconds()

    def loss_apart(self, batch: Batch) -> Tensor:
        # Not through DeepSpeed, which would take its backward for a part of the step.
        with self.world.autocast("bf16" if self._autocasts else "fp32"):
            loss_sum = self.model(batch.idx, batch.targets)
        return mean_share(loss_sum, batch, float(self.world.size))

    def step(self, lr: float, *figures: float) -> StepResult:
        set_learning_rate(self.optimizer, lr)
        loss_sum, *sums = self.world.sum(self._loss_sum.item(), *figures)
        self._loss_sum.zero_()
        self.losses.end_step()
        return StepResult(loss_sum, self._update(), tuple(sums))

    def _update(self) -> float:
        """The gradient's norm, whose update is refused where it is not finite."""
        if self.stage > 0:
            self.deepspeed.step()  # refuses by itself, and calls the norm infinite
            return float(self.deepspeed.get_global_grad_norm())
        norm = gradient_norm(self.model).item()
        if isfinite(norm):
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
        return norm

    def local_weights(self) -> list[Tensor]:
        parameters = super().local_weights()
        return [cast(ShardedParameter, p).ds_tensor for p in parameters] if self.stage == 3 else parameters

    def weights_written(self) -> None:
        if self.stage == 3:
            # Let go of what is gathered, or on its way, so that it is gathered anew.
            self._zero.parameter_offload.partition_all_parameters()

    def pieces(self) -> Iterator[Piece]:
        if self.stage == 0:
            yield from replicated_pieces(self, self.optimizer)
            return
        for kind in ("weight", *MOMENTS):
            for name, start, values in self._masters(kind):
                yield Piece(f"{kind}/{name}", start, values)

    def restore(self, checkpoint: CheckpointReader, *, updates: int) -> None:
        if self.stage == 0:
            restore_replicated(self, self.optimizer, checkpoint, updates)
            return
        self.read_like_weights("weight", self.local_weights(), checkpoint)
        self.weights_written()
        if updates:
            inner = self._zero.optimizer
            # A flat tensor for each group; stage 3 may cut its only group into several.
            for flat, group in zip(self._flat_masters(), cycle(inner.param_groups), strict=False):
                inner.state[flat] = restored_state(flat, updates, group)
        for kind in ("weight", *MOMENTS) if updates else ("weight",):
            for name, start, values in self._masters(kind):
                values.copy_(checkpoint.read(f"{kind}/{name}", start, start + len(values)))

    def pieces_like_weights(self, kind: str, tensors: Sequence[Tensor | None]) -> Iterator[Piece]:
        if self.stage < 3:
            yield from super().pieces_like_weights(kind, tensors)
            return
        for (name, parameter), tensor in zip(self.model.named_parameters(), tensors, strict=True):
            start, length = self._partition(parameter)
            if tensor is not None and length:
                yield Piece(f"{kind}/{name}", start, tensor[:length])

    def read_like_weights(self, kind: str, tensors: Sequence[Tensor | None], checkpoint: CheckpointReader) -> None:
        if self.stage < 3:
            super().read_like_weights(kind, tensors, checkpoint)
            return
        for (name, parameter), tensor in zip(self.model.named_parameters(), tensors, strict=True):
            start, length = self._partition(parameter)
            if tensor is not None and length:
                tensor[:length].copy_(checkpoint.read(f"{kind}/{name}", start, start + length))

    def _partition(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where this rank's part of a ZeRO 3 parameter begins, and its length without the padding."""
        sharded = cast(ShardedParameter, parameter)
        size = sharded.ds_tensor.numel()
        start = self.world.rank * size
        return start, max(0, min(size, sharded.ds_numel - start))

    def _flat_masters(self) -> list[Tensor]:
        """The flat fp32 tensors that this rank's optimizer steps, from stage 1 on."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _masters(self, kind: str) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter, where in it, the values themselves) of this rank's fp32 masters or one of their moments."""
        state = self._zero.optimizer.state
        for name, parameter in self.model.named_parameters():
            if self.stage == 3:
                group, at, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start, length = self._partition(parameter)
            elif (mapping := _mapping(parameter)) is None:  # none of it is this rank's
                continue
            else:
                group, at = mapping.param_group_index, mapping.hp_fragment_address.start
                start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            flat = self._flat_masters()[group]
            if kind != "weight":
                if kind not in state[flat]:
                    continue
                flat = state[flat][kind]
            if length:
                yield name, start, flat.detach()[at : at + length]

    def _matrix_stretches(self, muon: MuonAdamW) -> Iterator[MatrixStretch]:
        """Of its matrices, what this rank's flat fp32 masters hold, at stages 1 and 2."""
        for number, parameter in enumerate(muon.matrices):
            if mapping := _mapping(parameter):
                yield MatrixStretch(
                    number, mapping.lp_fragment_address.start, self._flat_masters()[mapping.param_group_index],
                    mapping.hp_fragment_address.start, mapping.lp_fragment_address.numel,
                )  # fmt: skip

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage == 0:
            return replicated(self, self.optimizer)
        # What a stage shares out each rank holds a part of; what is gathered from the parts must be alike.
        return ((f"weight/{name}", weight) for name, weight in self.weights())

    def replicas_like_weights(self, kind: str, tensors: Sequence[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        return super().replicas_like_weights(kind, tensors) if self.stage < 3 else iter(())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage < 3:
            yield from super().weights()
            return
        self.weights_written()  # let go of what the last forward has gathered
        for name, parameter in self.model.named_parameters():
            with self._gathered([parameter]):  # one at a time: the device need not hold the whole model
                yield name, parameter.detach()

    def state_dict(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return super().state_dict()
        is_first = self.world.is_first
        return {name: weight.to("cpu", torch.float32, copy=True) for name, weight in self.weights() if is_first}


def _mapping(parameter: nn.Parameter) -> MasterMapping | None:
    """Where this rank's masters of a parameter are, at stages 1 and 2; None where it has none."""
    return cast(MappedParameter, parameter)._hp_mapping
