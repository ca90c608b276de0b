"""The sharded engine as ranks of 128, and whether a GPU could capture its step.

torch's "fake" backend gives a rank its place in a large world; its collectives exchange nothing.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed import buckets
from nanogpt.distributed.world import World
from nanogpt.engine import Batch, EngineOptions
from nanogpt.engine.sharded import ShardedEngine
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.optim.muon import is_matrix
from nanogpt.optim.optimizer import make_capturable
from nanogpt.plan.memory import predict_memory
from nanogpt.plan.plan import make_plan

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32}
RANKS = 128


@pytest.fixture(autouse=True)
def many_buckets(monkeypatch):
    """So that this small model is cut into many."""
    monkeypatch.setattr(buckets, "CHUNK_BYTES", 100)


class Recorder(TorchDispatchMode):
    """Every operation with the shapes and types of what it was given; of a collective's group nothing."""

    def __init__(self):
        super().__init__()
        self.all, self.collectives = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [
            (each.dtype, tuple(each.shape)) for each in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(each)
        ]
        if function.namespace == "c10d":
            self.collectives.append((str(function), given))
        elif "wait" not in str(function):
            self.all.append((str(function), given))
        return function(*args, **(kwargs or {}))


def built(world, optimizer, precision="fp32", compression="none"):
    """An engine around a small model, and a batch of its rows."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=211, block_size=16, **SHAPE))
    ids = torch.zeros(1, 17, dtype=torch.long, device=world.device)
    batch = Batch(ids[:, :-1], ids[:, 1:], 16 * world.size)
    options = EngineOptions(precision, optimizer, False, [batch], gradient_compression=compression)
    return ShardedEngine(model, world, options), batch


@pytest.fixture
def as_rank():
    """as_rank(r): the world of rank r of 128, or of so many."""

    def of(rank, ranks=RANKS):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        return World(rank=rank, local_rank=0, size=ranks, device=torch.device("cpu"))

    yield of
    dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("precision", "compression", "gradients_in_bf16"),
    [("fp32", "none", "none"), ("fp32", "bf16", "all"), ("bf16", "none", "matrices"), ("bf16", "bf16", "all")],
)
@pytest.mark.parametrize("is_one_node", [True, False])
def test_all_ranks_call_the_same_collectives(
    is_one_node, optimizer, precision, compression, gradients_in_bf16, as_rank
):
    """Invariant: the first, the second and the last rank of 128: the same sequence of the same sizes, step by step.

    The blocks' matrices are gathered in bf16 where they are computed with in it, and all else in fp32. Between nodes
    gradients are sent in bf16 where that is asked alone.
    """
    found = []
    for rank in (0, 1, RANKS - 1):
        world = replace(as_rank(rank), local_size=RANKS if is_one_node else 8)
        engine, batch = built(world, optimizer, precision, compression)
        with Recorder() as recorded:
            for _ in range(2):
                before = len(recorded.collectives)
                engine.forward_backward(batch, is_last=False)
                assert len(recorded.collectives) == before, "this one communicates nothing"
                engine.forward_backward(batch, is_last=True)
                engine.step(1e-3, 0.0, 1.0)
        found.append(recorded.collectives)
    assert found[0] == found[1] == found[2]
    half = len(found[0]) // 2
    assert found[0][:half] == found[0][half:], "each step calls the same"
    assert len(engine._buckets) > 6, "many"
    matrices = [bucket for bucket in engine._buckets if is_matrix(*bucket.parameters[0])]
    small = {"none": [], "matrices": matrices if is_one_node else [], "all": engine._buckets}[gradients_in_bf16]
    cast = matrices if precision == "bf16" else []
    for words, wanted in (
        ("alltoall", [(torch.bfloat16, bucket.weights.numel()) for bucket in small if is_one_node]),
        (
            "reduce_scatter",
            [
                (torch.bfloat16 if b in small else torch.float32, b.weights.numel())
                for b in engine._buckets
                if not (is_one_node and b in small)
            ],
        ),
        ("allgather", [(torch.bfloat16 if b in cast else torch.float32, b.weights.numel()) for b in engine._buckets]),
    ):
        each = [given for name, given in found[0][:half] if words in name]
        assert Counter(map(type_and_size, each)) == Counter(wanted), words


def type_and_size(given):
    """Of what a collective is given: the one type, and how many values the whole has."""
    (kind,) = {kind for kind, _ in given}
    return kind, max(size for _, (size,) in given)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_rank_holds_its_share(ranks, optimizer, as_rank):
    """Reference: memory.py's formula, and the padding to whole rows of 1,024 values that it leaves out, exactly."""
    world = as_rank(0, ranks)  # the last of three has no matrix, and no moments of the padding that stands for it
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32}
    engine, batch = built(world, optimizer)
    engine.forward_backward(batch, is_last=True)
    engine.step(1e-3)
    config = make_plan(TrainConfig(**shape, engine="sharded", optimizer=optimizer, dtype="fp32"), world).config
    predicted = predict_memory(config, world_size=ranks, device_type="cuda", deepspeed=None)
    not_there = 4 * (GPTConfig(**shape).num_parameters - engine.model.num_parameters())  # bytes; vocabulary, positions
    rows = 0  # values of padding in all, where chunks are rows
    for bucket in engine._buckets:
        if optimizer == "adamw" or not is_matrix(*bucket.parameters[0]):  # whole matrices' padding is foreseen
            padding = bucket.weights.numel() - sum(p.numel() for _, p in bucket.parameters)
            assert padding < ranks * buckets.ROW
            rows += padding
    moments = [m for state in engine.optimizer.state.values() for name, m in state.items() if name != "step"]
    for name, held, copies in (
        ("weights", [bucket.weights for bucket in engine._buckets], 1),
        ("gradients", [bucket.gradients for bucket in engine._buckets], 1),
        ("optimizer", moments, 2 / ranks),
    ):
        expected = getattr(predicted, name) - copies * (not_there - 4 * rows)
        assert sum(tensor.nbytes for tensor in held) == pytest.approx(expected, abs=16), name


class NoHost(Recorder):
    """Refuses whatever would make the host wait for a device's value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "the host reads a value"
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_captured_neither_waits_nor_differs(optimizer, precision, as_rank, monkeypatch):
    """Invariant: gradient, sums and update need no value on the host, and every step does the same to the same shapes.

    On a CPU, whose kernels are others; a GPU's are watched by the capture itself.
    """
    engine, batch = built(as_rank(1), optimizer, precision)
    make_capturable(engine.optimizer, engine.world.device)
    engine.host_refuses = False  # as on a GPU
    figures = engine.world.on_device(0.0, 1.0)
    for reading in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, reading, refused)
    steps = []
    for _ in range(3):
        with NoHost() as recorded:
            engine.forward_backward(batch, is_last=True)
            engine._update(engine._sum_up(figures))
        steps.append((recorded.all, recorded.collectives))
    assert steps[1] == steps[2], "the first one makes the optimizer's state"
    assert len(steps[1][0]) > 100
    monkeypatch.undo()
    with NoHost(), pytest.raises(AssertionError, match="the host reads a value"):
        engine._loss_sum.item()


def refused(*_):
    """Instead of a method that brings a value to the host."""
    raise AssertionError("the host reads a value")
