"""How a run ends: each way once, with what it writes, says and returns.

return finished(context, report, state, engine, evaluator, token_losses, was_evaluated=True)
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from nanogpt.config.errors import ConfigError
from nanogpt.distributed.world import World
from nanogpt.engine import Engine
from nanogpt.evaluate.scorecard import Scorecard
from nanogpt.monitor.loggers import Recitation
from nanogpt.plan.plan import Plan
from nanogpt.plots.recall_map import headline
from nanogpt.plots.recall_png import save_recall
from nanogpt.storage.report import Report
from nanogpt.storage.resume import ResumePoint
from nanogpt.storage.run_dir import FINISHED, REPORT, save_weights
from nanogpt.token_losses.recorder import TokenLossRecorder
from nanogpt.training.evaluator import Evaluator
from nanogpt.training.messages import recite_beginning, tell_recitation, tell_result
from nanogpt.training.report import Result, make_report, write_report, write_stopped
from nanogpt.training.state import RunContext, TrainState
from nanogpt.utils.console import say
from nanogpt.utils.format import counted


def stopped_while_ranks_were_missing(plan: Plan, world: World) -> Result:
    """Asked to stop before the ranks had met: nothing has begun."""
    if world.is_first:
        say("asked to stop while other ranks were missing")
    return Result("stopped", Path(plan.config.out_dir))


def ended_before(start: ResumePoint, world: World) -> Result:
    """The run in this directory is over: its result again, if its report can still be read."""
    report = None
    if world.is_first:
        reached = start.ended == "target_reached"
        has = "has reached its target" if reached else f"has spent its --{start.ended}"
        remedy = "to train anew, name another --out_dir" if reached else f"a larger --{start.ended} goes on"
        say(f"{start.out_dir} {has} already: nothing to do; {remedy}")
        with suppress(ConfigError):  # another version's, say: that the run is over is known without it
            report = Report.read(start.out_dir / REPORT, of=FINISHED)
    return Result(start.ended, start.out_dir, report)


def stopped(
    context: RunContext,
    state: TrainState,
    engine: Engine | None = None,
    *,
    once_reported: Callable[[], None] = lambda: None,
) -> Result:
    """Asked to stop, and what can be saved is saved. Every rank must call.

    engine: None where none is built. once_reported: what may take seconds, when whoever asked may kill already.
    """
    report = make_report("stopped", None, context.plan, state, context.world, engine)
    if context.world.is_first:
        write_stopped(context.out_dir, report, context.logger.say)
    once_reported()
    context.logger.result(report, None)
    return Result("stopped", context.out_dir, report)


def lost(context: RunContext) -> Result:
    """The run directory is gone, or another run's: without a save, which whoever removed it does not want back."""
    if context.world.is_first:
        message = f"{context.out_dir} was removed, emptied or replaced during the run: what it held is lost"
        print(f"error: {message}", file=sys.stderr, flush=True)
        context.logger.died(FileNotFoundError(message))
    return Result("lost", context.out_dir)


def finished(
    context: RunContext,
    report: Report,
    state: TrainState,
    engine: Engine,
    evaluator: Evaluator,
    token_losses: TokenLossRecorder,
    *,
    was_evaluated: bool,
) -> Result:
    """The target reached, a budget spent, or too many steps without a finite loss: scores, weights, report, recitation.

    report: of make_report, to which scores and hashes are added. was_evaluated: by a full pass, whatever its loss.
    Every rank must call. Raises StopRequested while it scores, RunError where a file cannot be written.
    """
    card, recitation = None, None
    with evaluator.weights():
        if was_evaluated:
            started = time.perf_counter()
            context.logger.say("scoring what was memorised")
            card = evaluator.scorecard(step=state.step)
            report = replace(report, scores=card.values(), scores_s=time.perf_counter() - started)
        with context.phases(f"the end, step {state.step}", patient=True):
            weights = engine.state_dict()
            context.fence.check()
            if context.world.is_first:
                report = replace(report, weights_sha256=save_weights(context.out_dir, weights, evaluator.evaluated))
                write_report(context.out_dir, report)
            if card:
                recitation = _recite(context, report, engine, card)
            elif context.world.is_first:
                print(
                    f"error: {counted(state.bad_steps_in_a_row, 'step')} in a row had a non-finite loss or gradient; "
                    f"the weights saved are from before them: try a lower --learning_rate, or --dtype=fp32",
                    file=sys.stderr,
                )
            told = (recitation.prompt, recitation.recited, recitation.verdict) if recitation else None
            token_losses.save(told)
    context.logger.result(report, recitation)
    return Result(report.exit_reason, context.out_dir, report)


def _recite(context: RunContext, report: Report, engine: Engine, card: Scorecard) -> Recitation:
    """The result in words, from the model's own mouth, and as a picture."""
    recitation = recite_beginning(engine.model, context.plan)
    tell_result(report, context.logger)
    tell_recitation(recitation, context.logger)
    if context.world.is_first:  # before W&B hears of the result and sends it
        save_recall(context.out_dir, card.recited, headline(context.plan.config.data, report), context.logger.say)
    return recitation
