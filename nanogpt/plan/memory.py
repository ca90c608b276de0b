"""What a rank will hold, in bytes, and whether the machine has it.

need = predict_memory(config, world_size=2, device_type="cpu", deepspeed=None)
need.total, need.activations

docs/explanation/memory.md has this formula beside measured peaks.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isqrt
from typing import Any

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.distributed.hardware import free_bytes
from nanogpt.distributed.world import World
from nanogpt.model.gpt import GPTConfig
from nanogpt.optim.muon import can_share_whole, channels_together, stack_depth
from nanogpt.optim.recipe import recipe_of
from nanogpt.utils.format import gigabytes

FP32, BF16 = 4, 2  # bytes
# Measured: Python, torch, matplotlib, DeepSpeed on a CPU.
RUNTIME = {"single": 350e6, "ddp": 400e6, "sharded": 400e6, "deepspeed": 480e6}
TOKENS_A_PART = 16_384  # of a full pass on a GPU, which waits for launches with fewer
BEYOND = 1.1  # an H200 gave out 1.03 to 1.09 of what was predicted (benchmarks/LOG.md)
WRITTEN_OUT = 512  # positions up to which attention on a CPU keeps its square of scores (model/gpt.py)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest."""

    weights: int
    gradients: int
    optimizer: int  # Adam's two moments, and from ZeRO 1 on the fp32 masters that it steps
    average: int  # of the weights, from the plateau on (--ema)
    activations: int  # of one micro-batch, kept for its backward
    logits: int  # of one micro-batch, and what losses and scores make of them
    buffers: int  # weights cast to bf16, and what engines communicate through
    checkpoint: int  # the copy that is written in the background; 0: a GPU has no room for it, and the host keeps it
    runtime: int  # Python, torch and other libraries; not on a GPU

    @property
    def total(self) -> int:
        """What the device must have, bytes."""
        return sum(asdict(self).values())


def predict_memory(
    config: ResolvedConfig, *, world_size: int, device_type: str, deepspeed: Mapping[str, Any] | None
) -> Memory:
    """The most that a rank will hold in a run with this resolved config; deepspeed: what deepspeed.initialize is given.

    Weights, gradients and moments are 4, 4 and 8 bytes a parameter, shared out as ZeRO's stage says (Rajbhandari et
    al., arXiv 1910.02054, figure 1). For the backward a block keeps 16 values a token and channel, as in Korthikanti et
    al., "Reducing Activation Recomputation" (arXiv 2205.05198), without dropout and with the fp32 residual stream of
    autocast; the loss holds three times its logits in fp32, on a CPU none of them (model/gpt.py), but full passes
    and scores hold them twice.
    """
    shape, on_cpu = GPTConfig.from_options(config), device_type == "cpu"
    parameters = shape.num_parameters
    in_bf16 = bool(deepspeed and deepspeed["bf16"]["enabled"])
    size = BF16 if in_bf16 else FP32  # of a weight and of its gradient
    stage = config.zero_stage or 0
    gradients_over, weights_over = (world_size if stage >= n else 1 for n in (2, 3))  # ranks
    sharded = config.engine == "sharded"  # as ZeRO 1 without masters: they are parts of the weights
    moments_over = world_size if stage or sharded else 1
    padding = _padding(config, shape, world_size) if sharded else 0
    masters = parameters * FP32 // world_size if stage else 0

    autocast = config.dtype == "bf16"
    tokens = min(config.micro_batch_size, -(-config.batch_size // world_size)) * config.context_length
    activations = _activations(config, tokens, on_cpu=on_cpu)
    logits = (2 if on_cpu else 3) * FP32 * tokens * shape.vocab_size
    checkpoint = _copy(config, parameters, world_size) if on_cpu else 0

    buffers = _communication(config, stage, shape, size, deepspeed, world_size, on_cpu=on_cpu)
    buffers += parameters * BF16 if autocast and not in_bf16 else 0
    buffers += 0 if on_cpu else _gradient_check(config, shape, world_size)
    moments = FP32 * (2 * parameters + padding)
    if recipe_of(config).orthogonalises:  # one moment of the blocks' matrices
        moments -= FP32 * shape.n_layer * shape.block_matrices
        update = _muon_update(config, shape, world_size, moments_over, on_cpu=on_cpu)
        # A CPU has given back what the forward held when this is there; CUDA graphs keep the memory of both.
        buffers += max(0, update - activations - logits) if on_cpu else update
    if stage == 3:  # the whole model, when it is built and when it is written: none of these is there then
        buffers += max(0, parameters * FP32 - activations - logits - checkpoint)
    return Memory(
        weights=(parameters + padding) * size // weights_over,
        gradients=(parameters + padding) * size // gradients_over,
        optimizer=moments // moments_over + masters,
        average=_averaged(config, parameters + padding) // (world_size if sharded else weights_over),
        activations=activations,
        logits=logits,
        buffers=buffers,
        checkpoint=checkpoint,
        runtime=int(RUNTIME[config.engine]) if on_cpu else 0,
    )


def evaluation_rows(config: ResolvedConfig, memory: Memory, world: World) -> int:
    """Windows that a rank evaluates at once: as many as it trains on; on a GPU TOKENS_A_PART, where they fit too.

    memory: what the run is predicted to need.
    """
    rows = config.micro_batch_size
    if world.device.type != "cuda" or (free := free_bytes(world)) is None:
        return rows
    wide = max(rows, TOKENS_A_PART // config.context_length)
    return wide if memory.total + _logits(config, memory, wide, world) <= free else rows


def with_copy_on_gpu(config: ResolvedConfig, memory: Memory, world: World) -> Memory:
    """memory with the copy for a checkpoint, where a GPU has room for it beside a full pass; on a CPU it is in there.

    memory: what the run is predicted to need. A copy that did not fit would end a run that can do without it.
    """
    if world.device.type != "cuda" or (free := free_bytes(world)) is None:
        return memory
    need = memory.total + _logits(config, memory, evaluation_rows(config, memory, world), world)
    copy = _copy(config, GPTConfig.from_options(config).num_parameters, world.size)
    return replace(memory, checkpoint=copy) if BEYOND * need + copy <= free else memory


def _logits(config: ResolvedConfig, memory: Memory, rows: int, world: World) -> int:
    """Bytes that a full pass of so many windows needs beside what a step keeps."""
    return memory.logits * rows // min(config.micro_batch_size, -(-config.batch_size // world.size))


def _is_one(config: ResolvedConfig, world_size: int) -> bool:
    """Whether a rank's share of a step is one micro-batch."""
    return config.micro_batch_size * world_size >= config.batch_size


def _gradient_check(config: ResolvedConfig, shape: GPTConfig, world_size: int) -> int:
    """Bytes on a GPU for the gradient of one window, computed beside graphs, which keep their memory."""
    if world_size == 1 or not config.gradient_check_every or not _is_one(config, world_size):
        return 0
    cast = shape.num_parameters * BF16 if config.dtype == "bf16" else 0
    logits = 3 * FP32 * config.context_length * shape.vocab_size
    embedding = FP32 * shape.vocab_size * shape.n_embd
    return cast + embedding + logits + _activations(config, config.context_length, on_cpu=False)


def _averaged(config: ResolvedConfig, parameters: int) -> int:
    return parameters * FP32 if config.ema else 0


def _copy(config: ResolvedConfig, parameters: int, world_size: int) -> int:
    """Bytes of a rank's share of a checkpoint: weights, two moments and the average, in fp32."""
    return (3 * FP32 * parameters + _averaged(config, parameters)) // world_size


def _activations(config: ResolvedConfig, tokens: int, *, on_cpu: bool) -> int:
    """Bytes that the blocks keep of a micro-batch of so many tokens for its backward."""
    autocast = config.dtype == "bf16"
    channel = 36 if autocast else 64  # bytes a token and channel
    scores = 0  # bytes a token, head and position that it sees
    if on_cpu and config.context_length <= WRITTEN_OUT:
        scores = FP32 + BF16 if autocast else FP32
    return config.n_layer * tokens * (channel * config.n_embd + scores * config.n_head * config.context_length)


def _padding(config: ResolvedConfig, shape: GPTConfig, world_size: int) -> int:
    """Values that the sharded engine adds to the blocks' matrices: Muon's ranks own whole ones, of a shape as many."""
    if not (recipe_of(config).orthogonalises and can_share_whole(shape.n_layer, world_size)):
        return 0
    return (stack_depth(shape.n_layer, world_size) - shape.n_layer) * shape.block_matrices


def _muon_update(config: ResolvedConfig, shape: GPTConfig, world_size: int, moments_over: int, *, on_cpu: bool) -> int:
    """Bytes that a step of optim/muon.py holds for a moment: the stack, and what is made of a share of it.

    A GPU holds the gradients again, or what stands for those that it refuses.
    """
    gradients = 0 if on_cpu else FP32 * shape.n_layer * shape.block_matrices // moments_over
    a_block = shape.block_matrices * (BF16 if config.dtype == "bf16" else FP32)
    share = -(-shape.n_layer // world_size) * a_block
    # The results, the tall matrices in pieces (7/12) and the last of them before it is put together (4/12); gram
    # matrices, of which there are twice a third of channels / width.
    orthogonalised = share * (23 / 12 + 2 / 3 * channels_together(shape.n_embd) / shape.n_embd)
    owns_whole = config.engine == "sharded" and can_share_whole(shape.n_layer, world_size)
    stack = share if owns_whole else stack_depth(shape.n_layer, world_size) * a_block
    return gradients + stack + int(orthogonalised)


def _communication(
    config: ResolvedConfig,
    stage: int,
    shape: GPTConfig,
    size: int,
    deepspeed: Mapping[str, Any] | None,
    world_size: int,
    *,
    on_cpu: bool,
) -> int:
    """Bytes that an engine communicates through, or gathers weights into; size: of a weight, bytes."""
    parameters = shape.num_parameters
    if config.engine == "sharded":
        cast = shape.n_layer * shape.block_matrices if config.dtype == "bf16" else 0
        in_bf16 = (
            parameters if config.gradient_compression == "bf16" else cast * _is_one(config, world_size)
        )  # gradients
        halved = BF16 * (2 * in_bf16 + cast) if world_size > 1 else 0  # sent and received, and weights received
        # gloo reduces a copy of the gradient; a compiled backward has made all of it before any is put in a bucket.
        return halved + parameters * FP32 * (on_cpu + (config.compile == "true"))
    if config.engine == "ddp":
        return parameters * FP32  # its first buckets, given back when it has seen in which order gradients come
    if not (deepspeed and stage):
        return 0
    zero = deepspeed["zero_optimization"]
    reduced = zero.get("reduce_bucket_size", 5e8) * (2 if zero.get("overlap_comm") else 1)  # DeepSpeed's default
    gathered = zero.get("stage3_max_live_parameters", 1e9) if stage == 3 else zero.get("allgather_bucket_size", 5e8)
    return size * (min(2 * parameters, int(reduced)) + min(parameters, int(gathered)))


def shortage(config: ResolvedConfig, world: World, deepspeed: Mapping[str, Any] | None) -> str:
    """One line where this rank's device has less than its ranks are predicted to need, and what would fit; else ''."""
    free = free_bytes(world)
    ranks = world.local_size if world.device.type == "cpu" else 1  # that share what is free

    def need(micro_batch_size: int) -> Memory:
        return predict_memory(
            replace(config, micro_batch_size=micro_batch_size), world_size=world.size, device_type=world.device.type,
            deepspeed=deepspeed,
        )  # fmt: skip

    a_rank = need(config.micro_batch_size).total
    if free is None or ranks * a_rank <= free:
        return ""
    share = -(-config.batch_size // world.size)
    some = [m for m in range(1, isqrt(share) + 1) if share % m == 0]
    divisors = some + [share // m for m in reversed(some)]
    smaller = (m for m in reversed(divisors) if m < config.micro_batch_size)
    fits = next((m for m in smaller if ranks * need(m).total <= free), None)
    mend = (
        "no --micro_batch_size makes it fit: use a smaller model, or more devices with ZeRO (docs/how-to/deepspeed.md)"
        if fits is None
        else f"--micro_batch_size={fits} needs {gigabytes(ranks * need(fits).total)}"
    )
    ranks_of = f" ({ranks} ranks x {gigabytes(a_rank)})" if ranks > 1 else ""
    return f"about {gigabytes(ranks * a_rank)} of memory{ranks_of} are needed, {gigabytes(free)} are free here: {mend}"
