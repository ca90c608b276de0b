"""What a checkpoint of a run is made of, and when one is due.

manager.begin()                   # a copy in memory; a thread writes it
manager.save_and_wait()           # complete when this returns, once a step
"""

import time
from dataclasses import asdict

from nanogpt.distributed.replicas import Replicas
from nanogpt.engine import Engine
from nanogpt.optim.ema import EMA
from nanogpt.storage.checkpoint import CheckpointReader, CheckpointWriter
from nanogpt.training.state import RunContext, TrainState


class CheckpointManager:
    """One rank's part. Every rank must call every method."""

    def __init__(
        self,
        context: RunContext,
        checkpointer: CheckpointWriter,
        engine: Engine,
        average: EMA,
        state: TrainState,
        replicas: Replicas,
        *,
        wandb_run_id: str,
    ) -> None:
        self._plan, self._logger, self._fence = context.plan, context.logger, context.fence
        self._checkpointer, self._engine, self._average = checkpointer, engine, average
        self._state, self._replicas, self._wandb_run_id = state, replicas, wandb_run_id
        self._begun_step = 0  # of the newest checkpoint
        self._begun_at = time.perf_counter()
        self.newest: int | None = None  # step of the newest complete checkpoint

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._checkpointer.writing

    @property
    def overdue(self) -> bool:
        """Whether by this rank's clock the last save is checkpoint_minutes ago."""
        minutes = self._plan.config.checkpoint_minutes
        return minutes is not None and time.perf_counter() - self._begun_at > 60 * minutes

    def begin(self) -> None:
        """Save what is now, in the background; a save that is still under way stands for it.

        Raises ReplicaError where the ranks do not hold the same: each writes a share of it.
        """
        if self._checkpointer.begun:
            return
        self._replicas.check(self._state.step)
        pieces = list(self._engine.pieces())
        if self._state.schedule.averaging:
            pieces += self._engine.pieces_like_weights("mean", self._average.mean)
        progress = self._state.state_dict() | {
            "config": asdict(self._plan.config),
            "corpus_sha256": self._plan.dataset.corpus.sha256,
            "world_size": self._engine.world.size,
            "wandb_run_id": self._wandb_run_id,
            "goes_round": self._plan.dataset.windows.goes_round,
        }
        self._checkpointer.begin(self._state.step, pieces, progress)
        self._begun_step, self._begun_at = self._state.step, time.perf_counter()

    def commit(self) -> None:
        """Complete the save that was begun, if any, once every rank's thread is done."""
        if not self._checkpointer.begun:
            return
        self._fence.check()
        if failure := self._checkpointer.commit():
            kept = "there is none yet" if self.newest is None else f"that of step {self.newest} is kept"
            self._logger.say(
                f"warning: the checkpoint of step {self._begun_step} could not be saved ({failure}); {kept}, and the "
                f"run goes on"
            )
        else:
            self.newest = self._begun_step

    def save_and_wait(self) -> None:
        """A checkpoint of this step, complete when this returns; one that has been begun at it stands for it."""
        self.commit()
        if self._begun_step != self._state.step:
            self.begin()
            self.commit()

    def restore(self, checkpoint: CheckpointReader) -> None:
        """Go on from checkpoint, whatever engine wrote it, on however many ranks, and close it."""
        state = self._state
        state.load_state_dict(checkpoint.progress, ranks=self._engine.world.size)
        self._engine.restore(checkpoint, updates=state.step - state.bad_steps)
        if state.schedule.averaging:
            self._engine.read_like_weights("mean", self._average.begin(), checkpoint)
        checkpoint.close()
        self.newest = checkpoint.step
        self._logger.say(f"resumed from {checkpoint.path.name} of {checkpoint.path.parent.parent}")
