"""What comes out of a checkpoint again, which of two that fall together is written, and who may complete one."""

from math import isfinite, nan
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.copier import copier, plan_of
from harness.runs import ALONE
from nanogpt.config.errors import RunError
from nanogpt.distributed.replicas import fingerprints
from nanogpt.engine import Batch, EngineOptions, build_engine
from nanogpt.model.gpt import GPT
from nanogpt.optim.ema import EMA
from nanogpt.storage.checkpoint import CheckpointWriter, newest_intact
from nanogpt.storage.run_lock import Attempt, NoFence
from nanogpt.training import checkpoint_manager
from nanogpt.training.checkpoint_manager import CheckpointManager
from nanogpt.training.state import TrainState

IDS = torch.tensor([[5, 7, 5, 7, 9]])


class Run:
    """What of a run a checkpoint is about."""

    def __init__(self, plan, model, *, fence=None):
        self.out_dir, self.said, self.compared = Path(plan.config.out_dir), [], []
        options = EngineOptions(dtype="fp32", optimizer="adamw", compile=False, micro_batches=[])
        self.engine = build_engine("single", model, ALONE, options)
        self.average = EMA(self.engine.local_weights(), plan.config.ema)
        self.state = TrainState.of(plan.config, judged_windows=len(plan.dataset.judged), launched_at=0.0)
        self.manager = CheckpointManager(
            SimpleNamespace(plan=plan, logger=SimpleNamespace(say=self.said.append), fence=fence or NoFence()),
            CheckpointWriter(self.out_dir, ALONE, keep=9),
            self.engine,
            self.average,
            self.state,
            SimpleNamespace(check=self.compared.append),
            wandb_run_id="abc",
        )

    def train(self, *scales):
        """A step for each, whose gradient is scaled by it: by NaN it is refused."""
        for scale in scales:
            self.engine.forward_backward(Batch(IDS[:, :-1], IDS[:, 1:], step_tokens=4), is_last=True)
            self.engine.model.transformer.ln_f.bias.grad.mul_(scale)
            norm = self.engine.step(1e-2).grad_norm
            self.state.step += 1
            if isfinite(norm):
                self.state.schedule.observe(0.01)
                self.average.update()
            else:
                self.state.bad_steps += 1

    def held(self):
        """Fingerprints of weights, moments and average."""
        mean = self.engine.replicas_like_weights("mean", self.average.mean) if self.average.mean else ()
        return fingerprints([*self.engine.replicas(), *mean])

    def saved(self):
        """The steps of the checkpoints on the disk."""
        return sorted(int(path.name[-8:]) for path in (self.out_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("scales", [(nan, nan), (1, nan, 1)])
def test_a_run_goes_on_from_what_was_saved(tmp_path, scales):
    """Reference: the run itself, a step further, bit for bit; also where all or some of its steps were refused.

    A step that was refused is none for the optimizer, whose bias corrections count the others.
    """
    plan = plan_of(tmp_path)
    run, other = Run(plan, copier()), Run(plan, GPT(copier().config))
    run.train(*scales)
    run.state.step_is_unfinished = True
    run.manager.save_and_wait()
    assert run.compared == [len(scales)]
    checkpoint, _ = newest_intact(run.out_dir)
    assert checkpoint.progress["wandb_run_id"] == "abc"
    other.manager.restore(checkpoint)
    assert (other.state.step, other.state.bad_steps) == (len(scales), len(scales) - scales.count(1))
    assert other.manager.newest == len(scales)
    assert bool(other.average.mean) == (1 in scales)
    for each in (run, other):
        each.train(1)
    assert other.held() == run.held()


def test_one_checkpoint_of_a_step(tmp_path):
    """Invariant: a save that is under way, or was made at this step, stands for one that is asked for."""
    run = Run(plan_of(tmp_path), copier())
    run.train(1)
    run.manager.begin()
    run.train(1)
    run.manager.begin()  # that of step 1 is not yet complete
    assert run.saved() == []
    run.manager.commit()
    assert (run.saved(), run.manager.newest) == ([1], 1)
    run.manager.begin()
    run.manager.save_and_wait()
    run.manager.save_and_wait()
    run.manager.commit()  # nothing was begun
    assert (run.saved(), run.manager.newest, run.compared, run.said) == ([1, 2], 2, [1, 2], [])


def test_a_save_that_fails_is_told_of(tmp_path):
    """Invariant: one line says what is kept instead, none or the one before; the step is not the newest."""
    run = Run(plan_of(tmp_path), copier())
    for step, kept in ((1, "there is none yet"), (2, None), (3, "that of step 2 is kept")):
        run.train(1)
        in_the_way = run.out_dir / "checkpoints" / f".step_{step:08d}.tmp"
        in_the_way.parent.mkdir(parents=True, exist_ok=True)
        if kept:
            in_the_way.touch()
        run.manager.save_and_wait()
        assert run.manager.newest == (2 if step > 1 else None)
        assert [f"the checkpoint of step {step} could not be saved" in line for line in run.said] == [True] * bool(kept)
        assert all(kept in line for line in run.said)
        run.said.clear()
    assert run.saved() == [2]


def test_who_was_taken_over_completes_nothing(tmp_path):
    """Invariant: a checkpoint that was begun before another attempt raised the fence never gets its name."""
    plan = plan_of(tmp_path)
    Path(plan.config.out_dir).mkdir()
    run = Run(plan, copier(), fence=Attempt("7", 0).raise_fence(Path(plan.config.out_dir)))
    run.train(1)
    run.manager.save_and_wait()
    run.train(1)
    run.manager.begin()
    Attempt("7", 1).raise_fence(run.out_dir)
    with pytest.raises(RunError, match=r"attempt 7\.1 has taken over"):
        run.manager.commit()
    assert (run.saved(), run.manager.newest) == ([1], 1)


@pytest.mark.parametrize(("minutes", "overdue"), [(None, False), (2.0, True), (2.01, False)])
def test_when_one_is_overdue(tmp_path, monkeypatch, minutes, overdue):
    """Reference: written out, two minutes and a bit after the last was begun; it took one of them to write."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(checkpoint_manager, "time", SimpleNamespace(perf_counter=lambda: now.s))
    run = Run(plan_of(tmp_path, checkpoint_minutes=minutes), copier())
    now.s = 1000.0
    run.train(1)
    run.manager.begin()
    assert not run.manager.overdue
    now.s += 60
    run.manager.commit()
    now.s += 60.1
    assert run.manager.overdue == overdue
