"""Judges a run by the weights that are its result, the average: full passes while it trains, scores at its end.

evaluator = Evaluator(context, plan.dataset.windows.on(world.device), engine, average)
evaluator.full_pass(step=120, is_last=False).reaches(config)
with evaluator.weights():
    card = evaluator.scorecard(step=120)
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch

from nanogpt.data.windows import Windows
from nanogpt.distributed.replicas import fingerprints
from nanogpt.engine import Engine
from nanogpt.evaluate.evaluation import Evaluation
from nanogpt.evaluate.recall import Forward, Reading, full_pass, hop_starts, read
from nanogpt.evaluate.scorecard import Scorecard, come_back, is_by_heart, make_scorecard, window_recall
from nanogpt.evaluate.screening import at_best, screen, sure
from nanogpt.model.generate import second_half
from nanogpt.optim.ema import EMA
from nanogpt.training.state import RunContext
from nanogpt.utils.signals import StopRequested

FEW = 0.25  # of the judged windows, which are worth a look in a full pass's place
FP32_COST = 4.0  # of a pass in fp32, in passes in bf16 (docs/reference/performance.md)


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
        """What the average has of the text, by all judged windows, in the phase that is under way.

        It is looked at in the precision of the training. Where that has the run's targets it is read again as others
        can compute it, and this decides. is_last: the run ends here, whatever it is.
        """
        config = self._plan.config
        self._reading, self.evaluated = None, {}
        with self.weights():
            found = self._look(step)
            # Scores of a run that ends without its recall are of the second reading, and so is what is said of it.
            undecided = found.reaches(config) or (is_last and config.target_recall is not None)
            if undecided and self._reading is None:
                looked = found.cost
                with self._scoring(step):
                    found = self._read(self._scores_forward())
                found = replace(found, cost=found.cost + looked)
            if is_last or found.reaches(config):
                self.evaluated = fingerprints(self._engine.weights())
        return found

    def rules_out_recall(self, missed: Sequence[int]) -> float:
        """What a look cost that shows that recall is not there yet, in full passes; 0 where it may be.

        missed: where few windows begin that the newest full pass missed, which are read again; nothing: for a recall of
        1 the recital is.
        """
        plan, windows, target = self._plan, self._windows, self._plan.config.target_recall
        if target is None or not (missed or target == 1):
            return 0.0
        starts = torch.tensor(missed) if missed else hop_starts(windows)
        quick, exact = self._forward(plan.config.dtype), self._scores_forward()
        with self.weights():
            found = read(self._engine.model, windows, starts, quick)
        found = sure(found, exact.dtype) if quick.dtype == exact.dtype else at_best(found, quick.dtype)
        judged = len(plan.dataset.judged)
        if missed:
            still = int((~come_back(windows, found.right)).sum())
            may_be = (judged - still) / judged >= target
        else:
            may_be = is_by_heart(windows, found)
        return 0.0 if may_be else len(starts) / judged

    def _look(self, step: int) -> Evaluation:
        """In the precision of the training."""
        plan, exact = self._plan, self._scores_forward()
        quick = self._forward(plan.config.dtype)
        if plan.config.target_recall is None:
            return Evaluation(full_pass(self._engine.model, self._windows, plan.dataset.judged, quick))
        if quick.dtype == exact.dtype:
            return self._read(exact)
        with self._scoring(step):
            return self._screen(quick, exact, plan.config.target_recall)

    def _screen(self, quick: Forward, exact: Forward, target: float) -> Evaluation:
        """In the precision of the training, near ties in that of the scores."""
        model, windows, config, judged = self._engine.model, self._windows, self._plan.config, self._plan.dataset.judged

        def enough(best: Reading) -> bool:
            return self._agreed_loss(best) <= config.target_loss and window_recall(windows, best) >= target

        part = second_half(windows.context_length)
        full = screen(model, windows, judged, quick, exact, part=part, enough=enough)
        loss, recall = self._agreed_loss(full.reading), window_recall(windows, full.reading)
        by_heart, cost = False, 1 + FP32_COST * full.read_again / len(judged)
        if recall == 1 == target and loss <= config.target_loss:
            known, starts = partial(is_by_heart, windows), hop_starts(windows)
            hops = screen(model, windows, starts, quick, exact, part=slice(part.start, None), enough=known)
            by_heart, cost = known(hops.reading), cost + (len(starts) + FP32_COST * hops.read_again) / len(judged)
        return Evaluation(loss, recall, by_heart, cost, self._missed(full.reading))

    def _read(self, forward: Forward) -> Evaluation:
        """In the precision of the scores."""
        model, windows, config, judged = self._engine.model, self._windows, self._plan.config, self._plan.dataset.judged
        full = self._reading = read(model, windows, judged, forward)
        loss, cost = self._agreed_loss(full), FP32_COST if (config.dtype, forward.dtype) == ("bf16", "fp32") else 1.0
        if config.target_recall is None:
            return Evaluation(loss, cost=cost)
        known, by_heart = sure(full, forward.dtype), False
        recall = window_recall(windows, known)
        if recall == 1 == config.target_recall and loss <= config.target_loss:
            hops = read(model, windows, hop_starts(windows), forward)
            by_heart, cost = is_by_heart(windows, sure(hops, forward.dtype)), cost * (1 + len(hops.right) / len(judged))
        return Evaluation(loss, recall, by_heart, cost, self._missed(known))

    def _missed(self, full: Reading) -> tuple[int, ...]:
        """Where the judged windows begin that do not come back; nothing where they are not few."""
        judged = self._plan.dataset.judged
        starts = judged[~come_back(self._windows, full.right)].tolist()
        return tuple(starts) if len(starts) <= FEW * len(judged) else ()

    def _agreed_loss(self, reading: Reading) -> float:
        """All must decide alike, and ranks on other CPUs may round the last bit of a mean otherwise."""
        (loss,) = self._engine.world.max(reading.loss)
        return loss

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
