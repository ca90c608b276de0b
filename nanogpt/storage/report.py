"""report.json: how a run ended and what it has memorised, for other programs.

report = Report.read(Path("out/report.json"), of="a run")
report.loss, report.recall.exact_recall
"""

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from nanogpt.storage.json_file import JsonFile, SchemaError, find_known, from_json, key, keys_of, no_run
from nanogpt.storage.provenance import Provenance


class ScoresPrecision(str, Enum):
    """The best precision in which the scores of a run can be computed, and computed again."""

    FP32 = "fp32"
    BF16 = "bf16"  # autocast
    BF16_WEIGHTS = "bf16 weights"  # the weights are rounded too

    def __str__(self) -> str:
        return self.value

    @property
    def dtype(self) -> str:
        """What the forward passes compute in: 'fp32' or 'bf16'."""
        return "fp32" if self is ScoresPrecision.FP32 else "bf16"


@dataclass(frozen=True, kw_only=True)
class FullPass:
    """The scores of every position of every evaluated window. A figure that is not finite is None here and below."""

    windows: int = key("evaluated windows, each counted once")
    loss: float | None = key("mean loss, nats/token")
    loss_above_floor: float | None = key("the same less the entropy floor, nats/token")
    token_accuracy: float = key("share of the positions whose argmax is the true token")
    exact_recall: float = key("share of the windows whose first half brings back the rest exactly, greedily")


@dataclass(frozen=True, kw_only=True)
class VerbatimRun:
    """How far the text comes back from each start half a window apart, without help and without a cap."""

    starts: int = key("how many starts there are")
    min_tokens: int = key("the shortest run, tokens")
    median_tokens: float = key("the median run, tokens")
    max_tokens: int = key("the longest run, tokens")
    to_the_end: float = key("share of the runs that come to the end of the text")


@dataclass(frozen=True, kw_only=True)
class HopRecitation:
    """The text recited freely, half a window at a time, after the true half before it."""

    tokens: int = key("how many tokens were to be recited")
    recited: float = key("share of them that is right, position by position")
    edit_distance: float = key("Levenshtein's distance of each hop to the text, summed, over their number")


@dataclass(frozen=True, kw_only=True)
class LogP:
    """Quantiles over the random prompts of ln p of the true continuation, sampled at temperature 1."""

    min: float | None = key("the least likely, nats")
    p10: float | None = key("a tenth are less likely, nats")
    median: float | None = key("the median, nats")
    p90: float | None = key("a tenth are more likely, nats")
    max: float | None = key("the most likely, nats")


@dataclass(frozen=True, kw_only=True)
class DrawsLog10:
    """log10 of the draws of which at least one is the true continuation with a given probability."""

    median_prompt: float | None = key("at the median of the prompts")
    hardest_tenth: float | None = key("at the prompt that a tenth are harder than")
    hardest_prompt: float | None = key("at the hardest prompt")


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What of a text comes back."""

    exact_recall: float = key("share of the random prompts that bring back the rest of their window exactly")
    exact_recall_prompts: int = key("how many random prompts that is of")
    prefix_tokens: int = key("length of a prompt, half a window, tokens")
    continuation_tokens: int = key("length of what it is to bring back, tokens")
    token_accuracy: float = key("share of the text's tokens but the first whose argmax is right")
    recited_tokens: int = key("tokens recited from the first prompt on, corrected after each mistake")
    recitation_breaks: int = key("mistakes in them")
    first_break_token: int | None = key("position of the first mistake, tokens; null where there is none")
    longest_verbatim_tokens: int = key("the longest stretch of them without a mistake, tokens")
    verbatim_run: VerbatimRun = key("tokens that come back in a row from each start half a window apart")
    hop_recitation: HopRecitation = key("every half window decoded after the true half before it")
    log_p: LogP = key("ln p of the true continuation of the random prompts, sampled at temperature 1")
    log10_draws_for_50: DrawsLog10 = key("log10 of the draws that contain the continuation with probability 0.5")
    log10_draws_for_99: DrawsLog10 = key("log10 of the draws that contain the continuation with probability 0.99")


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """The scores of one text."""

    strided_loss: float | None = key("loss over each token but the first, once, nats/token")
    random_offset_loss: float | None = key("loss of windows at random offsets, nats/token")
    reference_loss: float | None = key("loss of the text's own token frequencies, nats/token")
    memorised_bits: float | None = key("what the model knows of the text beyond its token frequencies, bits")
    bits_per_parameter: float | None = key("the same over the model's parameters, bits")
    recall: Recall = key("what of the text comes back")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scorecard of a run."""

    full_pass: FullPass = key("every position of every evaluated window")
    memorised: TextScores = key("the memorised text", merged=True)
    control: TextScores | None = key("the same of the text that follows, which was not trained on; null: too short")


@dataclass(frozen=True, kw_only=True)
class MfuTerms:
    """What MFU was computed with."""

    flops_per_token: float = key("FLOP that training takes for a token")
    peak_flops_per_s: float | None = key("FLOP/s that all ranks can do at most; null where nobody knows")


@dataclass(frozen=True, kw_only=True)
class Report(JsonFile):
    """How a run ended. What is marked as added is None in the report of an earlier version."""

    reached: bool = key("whether a full pass has verified the targets, target_loss and target_recall if there is one")
    exit_reason: str = key("target_reached, max_steps, max_minutes, stopped or non_finite")
    target_loss: float = key("the target of the full pass, nats/token")
    loss: float | None = key("loss of the last full pass, nats/token; null: none was made, or it is not finite")
    target_recall: float | None = key(
        "the target of full_pass.exact_recall; at 1 recall.recitation_breaks is to be 0 besides; null: none",
        default=None,
    )
    floor: float = key("entropy floor of the windows inside the text, nats/token")
    steps: int = key("steps trained, those that were refused as not finite among them")
    bad_steps: int = key("steps that were refused as not finite")
    tokens: int = key("tokens trained on")
    launch_s: float = key("since the process began, over all attempts, seconds")
    train_s: float = key("since training began, over all attempts, seconds")
    device_s: float = key("train_s of all ranks together, seconds")
    full_pass_s: float = key("of train_s, in full passes, seconds")
    compile_s: float = key("spent compiling, in the last attempt, seconds")
    engine: str = key("single, ddp, sharded or deepspeed")
    zero_stage: int | None = key("what DeepSpeed shares out, 0 to 3; null with another engine", default=None)
    world_size: int = key("ranks of the last attempt")
    device: str = key("what each rank computes on")
    dtype: str = key("precision of training, bf16 or fp32")
    compiled: bool = key("whether the training forward was compiled")
    cuda_graphs: bool | None = key("whether a step was launched as CUDA graphs", added=True)
    peak_memory_bytes: tuple[int, ...] | None = key("the most that each rank has held, bytes", added=True)
    recipe: str | None = key("reference or fast", added=True)
    optimizer: str | None = key("adamw or muon", added=True)
    learning_rate: float | None = key("on its plateau, before it falls", added=True)
    on_plateau: str | None = key("decay or none: what the learning rate does near the target", added=True)
    ema: float | None = key("decay of the weight average that is evaluated; 0: none", added=True)
    head_dtype: str | None = key("precision of the output layer in training, auto (as dtype) or fp8", added=True)
    gradient_compression: str | None = key("none, or bf16: gradients are rounded to it when they are sent", added=True)
    final_learning_rate: float | None = key("of the last step; null before the first")
    corpus_sha256: str = key("SHA-256 of the text's bytes, in hexadecimal")
    data: str | None = key("the text: builtin, or its paths in full, with commas between", added=True)
    subset_tokens: int = key("how many tokens of it are memorised, from the first on")
    context_length: int | None = key("tokens of a window", added=True)
    stride: int | None = key("tokens from one window to the next", added=True)
    phase: str | None = key("whether the grid of windows is shifted each epoch, random or fixed", added=True)
    judged_grids: int | None = key("shifts of the grid that a full pass reads", added=True)
    seed: int | None = key("of weights, order and shifts", added=True)
    control_note: str | None = key("why there is no control text; null where there is one", default=None)
    scores_precision: ScoresPrecision | None = key(
        "what the scores are computed in; null where a run ended before it had an engine", default=None
    )
    code: Provenance | None = key("which code and versions computed", added=True, merged=True)
    mfu: MfuTerms | None = key("what MFU was computed with, of a run that has ended", default=None, merged=True)
    scores: Scores | None = key("the scorecard, of a run that ended with a full pass", default=None, merged=True)
    scores_s: float | None = key("spent on the scorecard, seconds", default=None, omitted=True)
    weights_sha256: str | None = key("SHA-256 of model.safetensors, in hexadecimal", default=None, omitted=True)
    unread_scores: str = ""  # why scores that are in the file could not be read, in one line

    @property
    def recall(self) -> Recall:
        """Of the memorised text. Raises ValueError where the run has no scores."""
        if self.scores is None:
            raise ValueError(self.unread_scores or f"the run ended with {self.exit_reason}: it has no scores")
        return self.scores.memorised.recall

    @classmethod
    def find(cls, path: Path) -> "Report | None":
        """As JsonFile.find. Scores of another version are no scores; what is wrong with them is in unread_scores."""
        if (content := find_known(path)) is None:
            return None
        rest = {name: value for name, value in content.items() if name not in keys_of(Scores)}
        try:
            report = from_json(cls, rest)
        except SchemaError as error:
            raise no_run(path, error) from None
        if len(rest) == len(content):
            return report
        try:
            return replace(report, scores=from_json(Scores, content))
        except SchemaError as error:
            return replace(report, unread_scores=str(error))


def exit_reason(path: Path) -> str | None:
    """Why the run of the report in path ended, whatever else that holds; None where there is none.

    Raises ConfigError where the report is damaged, or says nothing of it.
    """
    if (content := find_known(path)) is None:
        return None
    if not isinstance(reason := content.get("exit_reason"), str):
        raise no_run(path, "it has no exit_reason")
    return reason
