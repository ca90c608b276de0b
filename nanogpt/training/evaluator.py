"""Judges a run by the weights that are its result, the average: full passes while it trains, scores at its end.

evaluator = Evaluator(plan, plan.dataset.windows.on(world.device), engine, average, stop, watchdog)
loss = evaluator.full_pass(step=120)
with evaluator.weights():
    card = evaluator.scorecard(step=120)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from nanogpt.data.windows import Windows
from nanogpt.distributed.replicas import fingerprint
from nanogpt.distributed.watchdog import Watchdog
from nanogpt.engine import Engine
from nanogpt.evaluate.recall import Forward, Reading, full_pass, read
from nanogpt.evaluate.scorecard import Scorecard, make_scorecard, scores_dtype
from nanogpt.optim.ema import EMA
from nanogpt.plan.plan import Plan
from nanogpt.utils.signals import StopRequested, StopSignals


class Evaluator:
    """One rank's. Every rank must call every method, and gets the same; StopRequested can end each."""

    def __init__(
        self,
        plan: Plan,
        windows: Windows,
        engine: Engine,
        average: EMA,
        stop: StopSignals,
        watchdog: Watchdog,
    ) -> None:
        """windows: the plan's, where the model is."""
        self._plan, self._windows, self._engine, self._average = plan, windows, engine, average
        self._stop, self._watchdog = stop, watchdog
        self._reading: Reading | None = None  # of the newest full pass, if it was made as scores are
        self.evaluated: dict[str, bytes] = {}  # the fingerprint of each weight that the newest full pass read

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The average in the model inside."""
        with self._average.applied():
            self._engine.weights_written()
            yield
        self._engine.weights_written()

    def full_pass(self, *, step: int) -> float:
        """The average's mean loss over all judged windows, nats/token.

        One that reaches the target is the one that others can compute again.
        """
        plan, windows, model = self._plan, self._windows, self._engine.model
        self._reading = None
        with self.weights():
            loss = full_pass(model, windows, plan.dataset.judged, self._forward(plan.config.dtype, step))
            if loss <= plan.config.target_loss:
                self._reading = read(model, windows, plan.dataset.judged, self._scores_forward(step))
                # Ranks on other CPUs may round its last bit otherwise, and all must decide alike.
                (loss,) = self._engine.world.max(self._reading.loss)
            self.evaluated = {name: fingerprint(weight) for name, weight in self._engine.weights()}
        return loss

    def scorecard(self, *, step: int) -> Scorecard:
        """The scores of the weights in the model, in the precision in which others can compute them again."""
        plan = self._plan
        return make_scorecard(
            self._engine.model,
            plan.dataset.windows,
            plan.dataset.judged,
            plan.dataset.control,
            self._scores_forward(step),
            floor=plan.dataset.floor,
            full=self._reading,
        )

    def _scores_forward(self, step: int) -> Forward:
        # Patiently: in fp32 a part may take longer than a collective of the training may.
        return self._forward(scores_dtype(self._engine.scores_precision), step, patient=True)

    def _forward(self, dtype: str, step: int, *, patient: bool = False) -> Forward:
        between = partial(self._before_part, f"step {step}, full pass or scores", patient=patient)
        return Forward(self._engine.world, dtype, self._plan.config.micro_batch_size, before_part=between)

    def _before_part(self, place: str, *, patient: bool) -> None:
        """Raise StopRequested on every rank when any of them was asked to stop."""
        self._watchdog.at(place, patient=patient)
        if any(self._engine.world.sum(float(self._stop.requested))):
            raise StopRequested
