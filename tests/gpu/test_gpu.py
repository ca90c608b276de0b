"""What only a machine with a GPU can show: the same program there, by the same code."""

import math
import os
import sys
from contextlib import ExitStack

import pytest
import torch

from harness.runs import REPOSITORY, TINY, flags, metrics, report, torchrun, train
from nanogpt.distributed.snapshot import DeviceCopies
from nanogpt.engine import Batch, EngineOptions
from nanogpt.engine.cuda_graph import CudaGraphEngine, ShardedCudaGraphEngine
from nanogpt.engine.sharded import ShardedEngine
from nanogpt.engine.single import SingleEngine
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.storage.checkpoint import CheckpointWriter, Piece, newest_intact

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from parts.step import CollectingWorld

GRAPHED = [CudaGraphEngine, ShardedCudaGraphEngine]
ALL_GPUS = ",".join(map(str, range(torch.cuda.device_count())))
GPUS = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ALL_GPUS)}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpu_follows_the_cpus_curve(tmp_path):
    """Reference: the CPU's fp32 curve; 1e-3, as a GPU's matrix products round in another order."""
    options = TINY | {"max_steps": 20, "log_every": 1, "dtype": "fp32", "compile": "false"}
    assert train(*flags(**options, out_dir="gpu"), cwd=tmp_path, env=GPUS).returncode == 3
    assert train(*flags(**options, out_dir="cpu"), cwd=tmp_path, env={}).returncode == 3
    for a, b in zip(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


@pytest.fixture
def built(monkeypatch):
    """built(KIND, OPTIMIZER, DTYPE) is an engine in an NCCL world of one that makes every collective of its step.

    Graphs are gone before the process group is: a collective in one needs it.
    """
    monkeypatch.setattr("nanogpt.optim.muon.CHANNELS", 32)  # half the width
    monkeypatch.setattr("nanogpt.distributed.buckets.CHUNK_BYTES", 12_000)  # so that this model too has many
    world = CollectingWorld(rank=0, local_rank=0, size=1, device=torch.device("cuda", 0))

    def of(kind, optimizer, dtype="fp32"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=64))
        options = EngineOptions(dtype, optimizer, compile=False, micro_batches=[_batch(0)])
        engine = kind(model, world, options)
        stack.callback(engine.close)
        return engine

    with ExitStack() as stack:
        stack.enter_context(world.process_group(even_alone=True))
        yield of


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", GRAPHED)
def test_graphs_change_nothing(kind, optimizer, built):
    """Reference: the single engine, kernel by kernel; 1e-5, as a GPU adds up the embedding's gradient in any order."""
    plain, graphed = built(SingleEngine, optimizer), built(kind, optimizer)
    _assert_same_steps(graphed, plain)
    assert graphed.cuda_graphs


def test_what_is_sent_in_bf16_is_in_the_graph(built):
    """Reference: the sharded engine, kernel by kernel: its bf16 gathers and all-to-alls, captured, change nothing."""
    plain, graphed = built(ShardedEngine, "adamw", "bf16"), built(ShardedCudaGraphEngine, "adamw", "bf16")
    _assert_same_steps(graphed, plain)
    assert graphed.cuda_graphs


@pytest.mark.parametrize("kind", GRAPHED)
def test_a_graph_refuses_a_non_finite_gradient(kind, built):
    """Invariant: weights and moments stay as they were, at the first step and when it is a graph's."""
    engine, batch = built(kind, "muon"), _batch(0)
    position = engine.model.transformer.wpe.weight
    for step in range(4):
        before = [p.detach().clone() for p in engine.model.parameters()]
        kept = position[0, 0].item()
        with torch.no_grad():
            position[0, 0] = float("nan")
        assert math.isnan(_step(engine, batch).grad_norm), step
        with torch.no_grad():
            position[0, 0] = kept
        assert all(map(torch.equal, before, engine.model.parameters())), step
        assert math.isfinite(_step(engine, batch).grad_norm), step
        assert not torch.equal(before[2], list(engine.model.parameters())[2]), "it goes on"


@pytest.mark.parametrize("part", ["_gradient", "_update_of_sums"])
@pytest.mark.parametrize("kind", GRAPHED)
def test_a_capture_that_fails_goes_on_kernel_by_kernel(kind, part, built, monkeypatch, capsys):
    """Reference: the single engine; no graph can hold a part that waits for the device. One line says so."""
    work = getattr(kind, part)

    def waiting(self):
        result = work(self)
        self._loss_sum.item()
        return result

    monkeypatch.setattr(kind, part, waiting)
    plain, graphed = built(SingleEngine, "adamw"), built(kind, "adamw")
    _assert_same_steps(graphed, plain)
    assert not graphed.cuda_graphs
    assert capsys.readouterr().out.count("no CUDA graph can be captured") == 1


@pytest.mark.parametrize("kind", GRAPHED)
def test_a_gradient_beside_a_graph_is_the_graphs_and_changes_nothing(kind, built):
    """Reference: the single engine's gradient; its steps too, while the other computes one beside each of its own."""
    plain, graphed = built(SingleEngine, "adamw"), built(kind, "adamw")
    for step in range(4):
        batch = _batch(step)
        beside = [torch.autograd.grad(e.loss_apart(batch), list(e.model.parameters())) for e in (graphed, plain)]
        for found, expected in zip(*beside, strict=True):
            assert (found - expected).norm() <= 1e-4 * expected.norm()
        a, b = (_step(engine, batch) for engine in (graphed, plain))
        assert a.loss_sum == pytest.approx(b.loss_sum, rel=1e-5), step
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5), step
    assert graphed.cuda_graphs


def _assert_same_steps(found, expected):
    for step in range(8):
        a, b = (_step(engine, _batch(step)) for engine in (found, expected))
        assert a.loss_sum == pytest.approx(b.loss_sum, rel=1e-5), step
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5), step
        assert a.figures == b.figures == (1.0, 2.0)
        torch.testing.assert_close(found.losses.newest(), expected.losses.newest(), rtol=1e-5, atol=1e-5)


def _step(engine, batch):
    engine.forward_backward(batch, is_last=True)
    return engine.step(1e-3, 1.0, 2.0)


def _batch(step):
    ids = torch.randint(50257, (4, 17), generator=torch.Generator().manual_seed(step)).cuda()
    return Batch(ids[:, :-1], ids[:, 1:], 64)


def _large(values):
    """So many, exact in fp32, whose period is not that of the parts in which they are taken to the host."""
    period = torch.arange(2**24 - 1, dtype=torch.float32)
    return period.repeat(values // len(period) + 1)[:values]


@pytest.mark.parametrize(("on_device", "steps_before"), [(True, 0), (True, 1), (True, 5), (False, 1)])
def test_a_save_is_of_its_moment_while_training_goes_on(on_device, steps_before, built, tmp_path):
    """Reference: weights and moments cloned when the save began; the steps beside it capture graphs and replay them.

    What is saved first is 2 GB beside them, so that the thread is still at work when the steps are.
    """
    engine = built(CudaGraphEngine, "adamw")

    def steps(count):
        for _ in range(count):
            assert math.isfinite(_step(engine, _batch(0)).grad_norm)

    steps(steps_before)
    large = _large(2**29).cuda()
    pieces = [Piece("mean/large", 0, large), *engine.pieces()]
    expected = {piece.name: piece.values.detach().clone() for piece in pieces[1:]}
    assert len(expected) == len(pieces) - 1, "one rank's pieces are whole"
    writer = CheckpointWriter(tmp_path, engine.world, keep=1, on_device=on_device)
    writer.begin(1, pieces, {})
    large.zero_()
    steps(6)
    torch.cuda.synchronize()
    assert writer.writing, "the steps are over before the save: it shows nothing"
    assert writer.commit() == ""
    checkpoint = newest_intact(tmp_path)[0]
    assert torch.equal(checkpoint.read("mean/large", 0, 2**29), _large(2**29))
    for name, values in expected.items():
        assert torch.equal(checkpoint.read(name, 0, len(values)), values.cpu()), name


def test_a_copy_leaves_the_gpu_when_it_has_arrived():
    """Invariant: after the copies have arrived the allocator has given out what it had before them."""
    large = _large(2**26).cuda()
    before = torch.cuda.memory_allocated()
    copies = DeviceCopies({"a": large, "b": large})
    assert torch.cuda.memory_allocated() == before + 2 * large.nbytes
    large.zero_()
    arrived = copies.on_host()
    assert torch.cuda.memory_allocated() == before
    assert all(torch.equal(values, _large(2**26)) for values in arrived.values())


@pytest.mark.parametrize("recipe", ["reference", "fast"])
def test_a_resumed_run_goes_on(recipe, tmp_path):
    """Reference: the run that was not interrupted; 1e-4, for the order in which a GPU adds."""
    options = TINY | {"recipe": recipe, "log_every": 1, "dtype": "fp32", "compile": "false"}
    assert train(*flags(**options, max_steps=12, out_dir="whole"), cwd=tmp_path, env=GPUS).returncode == 3
    for steps in (5, 12):
        assert train(*flags(**options, max_steps=steps, out_dir="parts"), cwd=tmp_path, env=GPUS).returncode == 3
    for a, b in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_gpu_reaches_the_target(tmp_path):
    """Invariant: bf16, the default there, CUDA graphs and torch.compile reach a verified target."""
    done = train(*flags(**TINY, compile="true", max_steps=600, out_dir="out"), cwd=tmp_path, timeout=600, env=GPUS)
    assert done.returncode == 0, done.stdout + done.stderr
    told = report(tmp_path / "out")
    assert [told[key] for key in ("reached", "dtype", "compiled", "cuda_graphs")] == [True, "bf16", True, True]


@pytest.mark.parametrize("engine", ["ddp", "sharded"])
def test_nccl_ranks_follow_one_process(engine, tmp_path):
    """Reference: one GPU; as many ranks as there are GPUs. A sharded step is CUDA graphs, collectives and all."""
    if (ranks := torch.cuda.device_count()) < 2:
        pytest.skip("needs two GPUs")
    options = TINY | {"max_steps": 20, "log_every": 1, "dtype": "fp32", "compile": "false"}
    assert train(*flags(**options, out_dir="one"), cwd=tmp_path, env=GPUS).returncode == 3
    torchrun(ranks, *flags(**options, engine=engine, out_dir="all"), cwd=tmp_path, env=GPUS)
    for a, b in zip(metrics(tmp_path / "all"), metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert report(tmp_path / "all")["cuda_graphs"] == (engine == "sharded")


@pytest.mark.parametrize("stage", range(4))
def test_zero_on_a_gpu_follows_one_process(stage, tmp_path):
    """Reference: the single engine on the same GPU; 1e-4, as a reduction of one rank changes nothing but the order."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    options = TINY | {"max_steps": 20, "log_every": 1, "dtype": "fp32", "compile": "false"}
    assert train(*flags(**options, out_dir="one"), cwd=tmp_path, env=GPUS).returncode == 3
    words = ("--engine=deepspeed", f"--zero_stage={stage}")
    assert train(*words, *flags(**options, out_dir="zero"), cwd=tmp_path, env=GPUS).returncode == 3
    for a, b in zip(metrics(tmp_path / "zero"), metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_more_ranks_than_gpus_are_refused(tmp_path):
    """Invariant: a rank without a GPU of its own is one line, not a crash in NCCL."""
    done = torchrun(torch.cuda.device_count() + 1, *flags(**TINY), cwd=tmp_path, env=GPUS)
    assert done.returncode != 0
    assert f"--nproc_per_node={torch.cuda.device_count()}" in done.stderr
    assert not (tmp_path / "out").exists()
