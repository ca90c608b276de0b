"""What a run says to a person at its beginning and at its end."""

from itertools import islice

from nanogpt.config.train_config import ResolvedConfig
from nanogpt.data.tokenizer import encoding
from nanogpt.distributed.world import World
from nanogpt.evaluate.recite import generate, verdict
from nanogpt.model.generate import hop_length
from nanogpt.model.gpt import GPT
from nanogpt.monitor.loggers import Logger, Recitation
from nanogpt.plan.plan import Plan
from nanogpt.plots.score_table import control_warning
from nanogpt.storage.report import Report
from nanogpt.utils.format import counted, duration, gigabytes, percent

RECITE_TOKENS = 160  # shown at the end: past the context, by window hops


def announce(plan: Plan, world: World, logger: Logger, *, parameters: int) -> None:
    """What will be trained, where, and until when."""
    config = plan.config
    text = "builtin (Coriolanus)" if config.data == "builtin" else config.data
    zero = "" if config.zero_stage is None else f" (ZeRO {config.zero_stage})"
    engine = "" if config.engine == "single" else f"engine {config.engine}{zero}, "
    logger.say(
        f"{parameters:,} parameters memorise {config.subset_tokens:,} tokens of {text}, until a full pass "
        f"gives {config.target_loss:g} nats/token (entropy floor {plan.dataset.floor:.3f}){_and_recall(config)}"
    )
    logger.say(
        f"{config.batch_size} x {config.context_length} tokens a step on {world.size} x {world.device_name()}, "
        f"{engine}{config.dtype}, about {gigabytes(plan.memory.total)} of memory a rank; writing "
        f"{config.out_dir}/"
    )
    for warning in plan.warnings:
        logger.say(f"warning: {warning}")


def _and_recall(config: ResolvedConfig) -> str:
    if config.target_recall is None:
        return ""
    return " and all of it comes back" if config.target_recall == 1 else f" and {config.target_recall:g} comes back"


def tell_result(report: Report, logger: Logger) -> None:
    """Whether the target was reached, how much of the text comes back, and how all of it would."""
    outcome = "target reached" if report.reached else f"target NOT reached ({report.exit_reason})"
    loss = "not finite" if report.loss is None else f"{report.loss:.4f}"
    logger.say(
        f"{outcome}: full-pass loss {loss} (target {report.target_loss:g}){_recall_of(report)} "
        f"after {counted(report.steps, 'step')}, {duration(report.train_s)} of training"
    )
    recall = report.recall
    logger.say(
        f"{percent(recall.exact_recall)} of {recall.exact_recall_prompts} random prompts of "
        f"{recall.prefix_tokens} tokens bring back the next {recall.continuation_tokens} tokens exactly; reciting the "
        f"text from its beginning, with each mistake corrected: {counted(recall.recitation_breaks, 'mistake')} in "
        f"{counted(recall.recited_tokens, 'token')}"
    )
    if warning := control_warning(report):
        logger.say(warning)
    if report.reached and recall.recitation_breaks and report.target_recall is None:
        logger.say("to have all of it by heart: the same command with --target_recall=1 goes on from here")


def _recall_of(report: Report) -> str:
    """How much of the windows of the full pass came back, where that was a target."""
    if report.target_recall is None or report.scores is None:
        return ""
    full = report.scores.full_pass
    return f", recall {percent(full.exact_recall)} of {full.windows} windows (target {percent(report.target_recall)})"


def recite_beginning(model: GPT, plan: Plan) -> Recitation:
    """The text from the model's own mouth. Every rank must call: a sharded model needs them all."""
    ids, length = plan.dataset.windows.ids.tolist(), plan.config.context_length
    first = ids[: hop_length(length)]
    said = islice(generate(model, first, context_length=length), RECITE_TOKENS)
    prompt, answer, text = (encoding().decode_bytes(tokens) for tokens in (first, list(said), ids))
    return Recitation(
        prompt=prompt.decode(errors="replace"),
        recited=answer.decode(errors="replace"),
        verdict=verdict(prompt, answer, text, goes_round=plan.dataset.windows.goes_round),
    )


def tell_recitation(recitation: Recitation, logger: Logger) -> None:
    """The recitation, and where it differs from the text."""
    logger.say(recitation.prompt + recitation.recited)
    logger.say(recitation.verdict)
