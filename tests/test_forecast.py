"""What is foretold of time, against recorded runs and against steps that are taken."""

import json
import sys
import time

import pytest
import torch

from conftest import REPOSITORY, TINY, flags, run
from nanogpt.config import TrainConfig
from nanogpt.engine import Batch, EngineOptions, build_engine
from nanogpt.forecast import RECORDED, step_seconds, steps_on_record
from nanogpt.model import GPT
from nanogpt.plan import make_plan
from nanogpt.run_dir import model_config
from nanogpt.world import World

CPU = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def test_the_record_is_that_of_the_curves():
    """Reference: the first line of each recorded curve that was trained as the program trains."""
    found = set()
    for path in (REPOSITORY / "benchmarks" / "curves").glob("*.jsonl"):
        about = json.loads(path.read_text().splitlines()[0])
        options = about["options"]
        usual = (about["optimizer"], about["exit_reason"], options["phase"], options["target_loss"])
        if usual == ("AdamW", "target_reached", "random", 0.099):
            found.add((*(options[name] for name in RECORDED[0]._fields[:6]), about["floor"], about["steps"]))
    assert found == {tuple(recorded) for recorded in RECORDED[:-1]}


def test_what_is_on_record_is_foretold_and_no_more():
    """Invariant: every recorded run lies within its own forecast; outside what was recorded nothing is said."""
    for recorded in RECORDED:
        options = {name: value for name, value in recorded._asdict().items() if name not in ("floor", "steps")}
        low, high = steps_on_record(make_plan(TrainConfig(n_head=4, **options), CPU).config, recorded.floor)
        assert low - 1 <= recorded.steps <= high + 1
    config = make_plan(TrainConfig(), CPU).config
    assert isinstance(steps_on_record(config, 0.036), tuple)
    for changes, why in (
        ({"phase": "fixed"}, "fixed grid"),
        ({"target_loss": 0.2}, "--target_loss=0.2"),
        ({"learning_rate": 0.1}, "--learning_rate=0.1 is outside"),
        ({"subset_tokens": 338_025}, "--subset_tokens=338025 is outside"),
    ):
        assert why in steps_on_record(TrainConfig(**(vars(config) | changes)), 0.036)
    assert "floor" in steps_on_record(config, 0.09)


def test_a_step_takes_what_was_foretold():
    """Reference: steps of the whole model in the same process, within a factor of 2.5 on a machine that others use."""
    config = make_plan(TrainConfig(n_layer=6, n_head=2, n_embd=64, dtype="fp32", batch_size=4), CPU).config
    foretold = step_seconds(config, CPU)
    engine = build_engine(
        "single", GPT(model_config(config)), CPU, EngineOptions("fp32", compile=False, micro_batches=[])
    )
    rows = torch.randint(50257, (4, 65))
    batch, taken = Batch(rows[:, :-1], rows[:, 1:], 256), []
    for _ in range(6):
        started = time.perf_counter()
        engine.forward_backward(batch, is_last=True)
        engine.step(1e-3)
        taken.append(time.perf_counter() - started)
    assert min(taken) / 2.5 < foretold < min(taken) * 2.5


def test_the_command(tmp_path):
    """Reference: read by eye; every engine of two ranks, nothing written; strict refuses, status 2, in one line."""
    command = (sys.executable, "-m", "nanogpt", "preflight")
    done = run(*command, "--ranks=2", *flags(**TINY, dtype="fp32"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "256 tokens of builtin in 224 different windows of 32: entropy floor 0.0" in done.stdout
    assert "a step: about " in done.stdout
    assert "time to target: unknown: --subset_tokens=256 is outside the 512 to 2048" in done.stdout
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| ddp", "| ZeRO"))]
    assert [row[0] for row in rows] == ["| ddp", "| ZeRO 0", "| ZeRO 1", "| ZeRO 2", "| ZeRO 3"]
    for row in rows:
        *parts, total = (float(figure.rstrip(" |")) for figure in row[1:])
        assert total == pytest.approx(sum(parts), abs=0.06)
    for words, line in (
        (["--target_loss=0.001", "--preflight=strict"], "error: --preflight=strict: --target_loss=0.001 is below"),
        (["--ranks=0"], "error: --ranks=0 must be a positive number"),
        (["--ranks=32"], "error: --batch_size=16 leaves some of the 32 ranks"),
    ):
        done = run(*command, *words, *flags(**TINY), cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_the_whole_of_tiny_shakespeare(tiny_shakespeare, tmp_path):
    """Reference: the known floor of every offset; a context, a grid and a subset are named that would do."""
    words = flags(**TINY | {"subset_tokens": 338_025, "context_length": 64}, data=tiny_shakespeare, dtype="fp32")
    done = run(sys.executable, "-m", "nanogpt", "preflight", *words, cwd=tmp_path)
    assert "entropy floor 0.1002, target 0.099" in done.stdout, done.stderr
    assert "--context_length=136 (floor 0.0472), --phase=fixed (floor 0.0421), --subset_tokens=7700" in done.stdout
    assert "time to target: never" in done.stdout
