"""Ranks that ought to hold the same are compared before a pass may end a run and before each save."""

import json
import os
import re
import shutil

import pytest
import torch

from harness.forks import forked, forked_ranks
from harness.runs import REPOSITORY, TINY, TRAIN, WORKERS, flags, metrics, report, torchrun, without_clocks

WORKER = WORKERS / "replicas_worker.py"
CELL = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "subset_tokens": 1000, "context_length": 32, "learning_rate": 1e-3,
    "batch_size": 6, "dtype": "fp32",
}  # fmt: skip
MOMENTS = ["exp_avg/", "exp_avg_sq/"]
CELLS = {
    "ddp": CELL | {"engine": "ddp", "changed": ["weight/", *MOMENTS, "mean/"]},
    "ddp, muon": CELL | {"engine": "ddp", "optimizer": "muon", "changed": ["momentum_buffer/"]},
    "sharded": CELL | {"engine": "sharded", "changed": ["weight/"]},
    "sharded, bf16": CELL | {"engine": "sharded", "dtype": "bf16", "changed": []},  # exact in parts, alike to a forward
    "zero 0": CELL | {"engine": "deepspeed", "zero_stage": 0, "changed": ["weight/", *MOMENTS, "mean/"]},
    "zero 1": CELL | {"engine": "deepspeed", "zero_stage": 1, "changed": ["weight/", "mean/"]},
    "zero 2": CELL | {"engine": "deepspeed", "zero_stage": 2, "changed": ["weight/", "mean/"]},
    "zero 3": CELL | {"engine": "deepspeed", "zero_stage": 3, "changed": []},
}
OPTIONS = TINY | {
    "subset_tokens": 64, "batch_size": 4, "learning_rate": 6e-3, "dtype": "fp32", "log_every": 1, "target_loss": 0.3,
    "on_plateau": "none", "ema": 0, "checkpoint_every": 5, "out_dir": "out",
}  # fmt: skip


def found_by(ranks, cells, directory, script=None):
    """What the worker found of each of cells; script: what starts it, if it needs a start of its own."""
    (directory / "cells.json").write_text(json.dumps(cells))
    words = ("cells.json", "found.json")
    done = (
        torchrun(ranks, *words, cwd=directory, script=script)
        if script
        else forked_ranks(ranks, directory, WORKER, *words)
    )
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "found.json").read_text())


@pytest.fixture(scope="module")
def of_three_ranks(tmp_path_factory):
    """What three ranks found of CELLS; a cell on ranks that agree raises nothing for six steps."""
    found = found_by(3, list(CELLS.values()), tmp_path_factory.mktemp("replicas"))
    return dict(zip(CELLS, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("engine", CELLS)
def test_one_value_of_one_rank_is_found_and_named(of_three_ranks, engine):
    """Invariant: whatever each rank holds whole is compared; of three ranks the odd one is named, and the tensor."""
    found = of_three_ranks[engine]
    assert found["exact"]
    assert not found["bits differ"]
    for kind in CELLS[engine]["changed"]:
        said = rf"rank 1 differs from the other 2 ranks in {kind}transformer\.\S+, between steps 6 and 7;"
        assert re.search(said, found[kind]), found[kind]
    if engine == "zero 3":
        assert {name.split("/")[0] for name in found["names"]} == {"weight"}, "what is gathered"


@pytest.mark.slow
def test_ranks_that_round_otherwise_are_no_fault(tmp_path):
    """Invariant: kernels without vectors, as another processor's, differ in bits and raise no alarm; a fault does."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no other kernels to differ from")
    (tmp_path / "start.py").write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1': os.environ['ATEN_CPU_CAPABILITY'] = 'default'\n"
        f"sys.path.insert(0, {str(WORKER.parent)!r})\n"
        "import replicas_worker\n"
        "replicas_worker.main(replicas_worker.run)\n"
    )
    (found,) = found_by(2, [CELLS["ddp"]], tmp_path, "start.py")
    assert (found["exact"], found["bits differ"]) == (False, True)
    for kind in CELLS["ddp"]["changed"]:
        assert f"ranks 0, 1 do not all hold the same in {kind}" in found[kind]


@pytest.mark.slow
def test_a_corrupted_replica_ends_the_run_before_anything_is_said_of_it(tmp_path):
    """Invariant: a bit of one rank's weights: status 1, no verdict, nothing saved; then the undisturbed run's curve."""
    reference = forked_ranks(2, tmp_path, TRAIN, *flags(**OPTIONS | {"out_dir": "undisturbed"}))
    assert reference.returncode == 0, reference.stderr
    done = forked_ranks(2, tmp_path, TRAIN, *flags(**OPTIONS, inject="flip:rank=1,step=7"), NANOGPT_ALLOW_FAULTS="1")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "ranks 0, 1 do not all hold the same in weight/transformer.wte.weight, " in line
    # They are compared before a save, which is left out while the one before is being written.
    assert re.search(r"between steps 5 and \d+; nothing was saved since", line), line
    out_dir = tmp_path / "out"
    assert {*os.listdir(out_dir / "checkpoints")} == {"step_00000005", "latest"}
    assert not (out_dir / "report.json").exists()
    again = forked_ranks(2, tmp_path, TRAIN, *flags(**OPTIONS))
    assert again.returncode == 0, again.stderr
    assert "resumed from step_00000005" in again.stdout
    rows = [[without_clocks(row) for row in metrics(tmp_path / name)] for name in ("out", "undisturbed")]
    assert rows[0] == rows[1]
    told = report(out_dir), report(tmp_path / "undisturbed")
    assert told[0]["weights_sha256"] == told[1]["weights_sha256"]


@pytest.mark.slow
def test_a_pass_over_two_models_verifies_nothing(tmp_path):
    """Invariant: a full pass whose mean over unlike replicas is below the target does not end the run as reached."""
    options = OPTIONS | {"target_loss": 20, "checkpoint_every": 1000}
    done = forked_ranks(2, tmp_path, TRAIN, *flags(**options, inject="flip:rank=1,step=1"), NANOGPT_ALLOW_FAULTS="1")
    assert done.returncode == 1
    assert "ranks 0, 1 do not all hold the same in weight/transformer.wte.weight, " in done.stderr
    assert "target reached" not in done.stdout
    assert not {"report.json", "model.safetensors", "checkpoints"} & set(os.listdir(tmp_path / "out"))


@pytest.mark.slow
def test_ranks_with_other_code_are_refused(tmp_path):
    """Invariant: one rank whose package has other betas trains nothing: one line, status 2, no directory."""
    shutil.copytree(REPOSITORY / "nanogpt", tmp_path / "other" / "nanogpt")
    optim = tmp_path / "other" / "nanogpt" / "optim" / "optimizer.py"
    optim.write_text(optim.read_text().replace("BETAS = (0.9, 0.95)", "BETAS = (0.9, 0.99)"))
    config = tmp_path / "other" / "nanogpt" / "config" / "train_config.py"  # of a later version
    config.write_text(
        config.read_text().replace("    seed: int =", "    new: int = option(1, 'an option')\n    seed: int =")
    )
    (tmp_path / "start.py").write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "if os.environ['RANK'] == '1': sys.path.insert(0, 'other')\n"
        "import train_overfit\n"
        "train_overfit.main(train_overfit.run)\n"
    )
    done = torchrun(2, *flags(**OPTIONS, max_steps=2), cwd=tmp_path, timeout=120, script="start.py")
    assert done.returncode != 0
    assert re.search(r"error: rank 1 has code with SHA-256 \w{16}, rank 0 \w{16}: make them the same", done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_run_that_breaks_after_a_full_pass_keeps_its_weights(tmp_path):
    """Invariant: the weights before non-finite steps are saved, though they are not those of the last full pass."""
    (tmp_path / "start.py").write_text(
        "import train_overfit\n"
        "from nanogpt.engine.single import SingleEngine\n"
        "from nanogpt.evaluate.eval_schedule import EvalSchedule\n"
        "due, forward_backward = EvalSchedule.due, SingleEngine.forward_backward\n"
        "EvalSchedule.due = lambda self: self._steps == 2\n"
        "def broken(self, batch, *, is_last, steps=[]):\n"
        "    steps.append(1)\n"
        "    forward_backward(self, batch, is_last=is_last)\n"
        "    if len(steps) > 4: self.model.lm_head.weight.grad.fill_(float('nan'))\n"
        "SingleEngine.forward_backward = broken\n"
        "train_overfit.main(train_overfit.run)\n"
    )
    options = OPTIONS | {"target_loss": 0.01, "max_bad_steps": 2}
    done = forked(tmp_path, tmp_path / "start.py", *flags(**options))
    assert done.returncode == 1
    assert "the weights saved are from before them" in done.stderr
    assert [row["step"] for row in metrics(tmp_path / "out") if row["full_pass_loss"]] == [2]
    assert report(tmp_path / "out")["exit_reason"] == "non_finite"
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("ending", [{"target_loss": 20}, {"target_loss": 0.01, "max_steps": 6}])
def test_weights_that_change_after_the_last_full_pass_are_not_saved(tmp_path, ending):
    """Invariant: whichever way a run ends, its file holds what the last pass read; the passes before take no prints."""
    (tmp_path / "start.py").write_text(
        "import train_overfit\n"
        "from nanogpt.evaluate.eval_schedule import EvalSchedule\n"
        "from nanogpt.training import evaluator\n"
        "EvalSchedule.due = lambda self: True\n"
        "full_pass, scorecard = evaluator.Evaluator.full_pass, evaluator.Evaluator.scorecard\n"
        "def told(self, **asked):\n"
        "    loss = full_pass(self, **asked)\n"
        "    print('prints', len(self.evaluated), flush=True)\n"
        "    return loss\n"
        "def noisy(self, **asked):\n"
        "    card = scorecard(self, **asked)\n"
        "    self._engine.model.lm_head.weight.data[7, 7] += 1e-6\n"
        "    return card\n"
        "evaluator.Evaluator.full_pass, evaluator.Evaluator.scorecard = told, noisy\n"
        "train_overfit.main(train_overfit.run)\n"
    )
    done = forked(tmp_path, tmp_path / "start.py", *flags(**OPTIONS | ending))
    assert (done.returncode, "memory or disk is faulty" in done.stderr) == (1, True), done.stderr
    prints = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("prints ")]
    assert prints[-1] > 0
    assert not any(prints[:-1])
    assert len(prints) == ending.get("max_steps", 1)
    assert not {"report.json", "model.safetensors"} & set(os.listdir(tmp_path / "out"))
