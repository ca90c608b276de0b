"""Judges a run by the weights that are its result, the average: full passes while it trains, scores at its end.

evaluator = Evaluator(context, plan.dataset.windows.on(world.device), engine, average)
evaluator.full_pass(step=120, is_last=False).reached
with evaluator.weights():
    card = evaluator.scorecard(step=120)
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.data.windows import Windows
from nanogpt.distributed.replicas import fingerprints
from nanogpt.engine import Engine
from nanogpt.evaluate.recall import Forward, Reading, full_pass, read
from nanogpt.evaluate.scorecard import Scorecard, make_scorecard, sure_recall
from nanogpt.optim.ema import EMA
from nanogpt.training.state import RunContext
from nanogpt.utils.signals import StopRequested


@dataclass(frozen=True)
class Evaluation:
    """What a full pass found, the same on every rank."""

    loss: float  # mean over all judged windows, nats/token
    recall: float | None = None  # of scorecard's sure_recall, where that is asked for and the loss is there

    def reaches(self, config: ResolvedConfig) -> bool:
        """Whether it verifies the run's targets."""
        return self.loss <= config.target_loss and recall_suffices(self.recall, config)


def recall_suffices(recall: float | None, config: ResolvedConfig) -> bool:
    """Whether it is the run's target, if that has one."""
    return config.target_recall is None or (recall is not None and recall >= config.target_recall)


class Evaluator:
    """One rank's. Every rank must call every method, and gets the same; StopRequested can end each."""

    def __init__(self, context: RunContext, windows: Windows, engine: Engine, average: EMA) -> None:
        """windows: the plan's, where the model is."""
        self._plan, self._phases, self._stop = context.plan, context.phases, context.stop
        self._windows, self._engine, self._average = windows, engine, average
        # Each part is a collective, so as many on every rank: what the rank with the least memory can take.
        self._rows = -int(engine.world.max(-float(context.plan.evaluation_rows))[0])
        self._reading: Reading | None = None  # of the newest full pass, if it was made as scores are
        # The fingerprint of each weight that the newest full pass read, if the run ends with it: all weights are read
        # for them, which ZeRO 3 has to gather first.
        self.evaluated: dict[str, bytes] = {}

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The average in the model inside, the weights again after, also where all ranks are asked to stop."""
        asked = None
        with self._average.applied():
            self._engine.weights_written()
            try:
                yield
            except StopRequested as stop:  # on every rank; after another error some rank may not come any more
                asked = stop
        self._engine.weights_written()
        if asked is not None:
            raise asked

    def full_pass(self, *, step: int, is_last: bool) -> Evaluation:
        """The average's mean loss over all judged windows, in the phase that is under way.

        One that reaches the target is the one that others can compute again. is_last: the run ends here, whatever it
        is.
        """
        plan, windows, model = self._plan, self._windows, self._engine.model
        self._reading, self.evaluated, recall = None, {}, None
        with self.weights():
            loss = full_pass(model, windows, plan.dataset.judged, self._forward(plan.config.dtype))
            if loss <= plan.config.target_loss:
                with self._scoring(step):
                    full = self._reading = read(model, windows, plan.dataset.judged, self._scores_forward())
                    # Ranks on other CPUs may round its last bit otherwise, and all must decide alike.
                    (loss,) = self._engine.world.max(full.loss)
                    if loss <= plan.config.target_loss and plan.config.target_recall is not None:
                        sure = sure_recall(model, windows, full, self._scores_forward())
                        recall = -self._engine.world.max(-sure)[0]
            found = Evaluation(loss, recall)
            if is_last or found.reaches(plan.config):
                self.evaluated = fingerprints(self._engine.weights())
        return found

    def scorecard(self, *, step: int) -> Scorecard:
        """The scores of the weights in the model, in the precision in which others can compute them again."""
        plan = self._plan
        with self._scoring(step):
            return make_scorecard(
                self._engine.model,
                plan.dataset.windows,
                plan.dataset.judged,
                plan.dataset.control,
                self._scores_forward(),
                floor=plan.dataset.floor,
                full=self._reading,
            )

    def _scoring(self, step: int) -> AbstractContextManager[None]:
        # Patiently: in fp32 a part may take longer than a collective of the training may.
        return self._phases("full pass or scores", step, patient=True)

    def _scores_forward(self) -> Forward:
        return self._forward(self._engine.scores_precision.dtype)

    def _forward(self, dtype: str) -> Forward:
        return Forward(self._engine.world, dtype, self._rows, before_part=self._before_part)

    def _before_part(self) -> None:
        """Raise StopRequested on every rank when any of them was asked to stop."""
        self._phases.tick()
        if any(self._engine.world.sum(float(self._stop.requested))):
            raise StopRequested
