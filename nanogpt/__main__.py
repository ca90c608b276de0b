"""Commands on a run, before one and over many.

python -m nanogpt recite out --prompt="Let us kill him, " --max_tokens=100
python -m nanogpt score out --line="Let us kill him"
python -m nanogpt score out --html=recall.html
python -m nanogpt verify out
python -m nanogpt checkpoint verify out
python -m nanogpt export out exported
python -m nanogpt plot runs/a runs/b --out=loss.png
python -m nanogpt preflight --ranks=8 --subset_tokens=4096
python -m nanogpt repeat --seeds=10 --out_dir=runs/repeat
"""

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from nanogpt.commands.repeat import RepeatOptions, repeat
from nanogpt.config.cli import main, parse
from nanogpt.config.errors import ConfigError, one_line
from nanogpt.config.files import user_path
from nanogpt.config.options import Options, option, require_positive
from nanogpt.config.train_config import TrainConfig
from nanogpt.storage.checkpoint import CheckpointError

if TYPE_CHECKING:
    from nanogpt.storage.run_dir import Run


@dataclass(frozen=True)
class ReciteOptions(Options):
    """What `recite` is asked."""

    run_dir: str = option(MISSING, "directory of a finished run")
    prompt: str | None = option(None, "text to go on from; none: the beginning of the memorised text")
    max_tokens: int = option(100, "how much to recite", "tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "max_tokens")


def recite(options: ReciteOptions) -> int:
    """Greedy continuation of a prompt, and on stderr how it compares with the text that the run memorised."""
    from nanogpt.data.tokenizer import encoding
    from nanogpt.evaluate.recite import continue_text, verdict
    from nanogpt.model.generate import hop_length
    from nanogpt.storage.run_dir import load_run

    run = load_run(options.run_dir)
    memorised, why_not = _memorised_ids(run.config, run.report)
    prompt = options.prompt
    if prompt is None:
        if why_not:
            raise ConfigError(f"--prompt is needed: {why_not}")
        first = encoding().decode_bytes(memorised[: hop_length(run.config.context_length)])
        prompt = first.decode(errors="ignore")  # without the part of a last character
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character
    said = b""
    print(prompt, end="", flush=True)
    # Not the tokens that only say the end of the prompt again.
    pieces = filter(None, continue_text(run.model, prompt, context_length=run.config.context_length))
    for piece in islice(pieces, options.max_tokens):
        said += piece
        print(utf8.decode(piece), end="", flush=True)
    print(utf8.decode(b"", final=True))
    compared = (
        f"[not compared: {why_not}]" if why_not else verdict(prompt.encode(), said, encoding().decode_bytes(memorised))
    )
    print(compared, file=sys.stderr)
    return 0


def _memorised_ids(config: TrainConfig, report: dict[str, Any]) -> tuple[list[int], str]:
    """The token ids that a run memorised and '', or none and why they cannot be had any more."""
    from nanogpt.data.corpus import read_corpus
    from nanogpt.data.tokenizer import encode

    try:
        corpus = read_corpus(config.data)
    except ConfigError as error:
        return [], str(error)
    if corpus.sha256 != report.get("corpus_sha256"):
        return [], f"{config.data} has changed since the run"
    return encode(corpus.text)[: config.subset_tokens], ""


@dataclass(frozen=True)
class ScoreOptions(Options):
    """What `score` is asked."""

    run_dir: str = option(MISSING, "directory of a finished run")
    line: str | None = option(None, "words of the memorised text: find the shortest prompt that brings them back")
    html: str | None = option(None, "a page to write for a browser: the text, token by token, as the model recites it")


def score(options: ScoreOptions) -> int:
    """What a run memorised and what it did not, as its report states it, beside a text that it was not trained on."""
    from nanogpt.plots.score_table import score_table
    from nanogpt.storage.run_dir import load_run

    run = load_run(options.run_dir)
    if run.report.get("recall") is None:
        raise ConfigError(f"{options.run_dir} has no scores: the run ended with {run.report.get('exit_reason')}")
    if options.html is not None:
        parent = user_path(options.html, f"--html={options.html}").parent
        if not os.path.isdir(parent):  # known before anything is computed
            raise ConfigError(f"--html={options.html} cannot be written: {parent} is no directory")
    if options.line is None:
        with _as_reported(options.run_dir):
            table = score_table(run.report)
        print(table, end="")
    else:
        _tell_shortest_prompt(run, options.line)
    if options.html is not None:
        _write_page(run, options)
    return 0


@contextmanager
def _as_reported(run_dir: str) -> Iterator[None]:
    """Read scores within it. Raises ConfigError where report.json has others than this version writes."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{run_dir} was scored by another version, or edited: {error!r}") from None


def _tell_shortest_prompt(run: "Run", line: str) -> None:
    """How much of the text before line it takes to bring line back. Raises ConfigError."""
    from nanogpt.data.tokenizer import decode
    from nanogpt.evaluate.recite import locate, shortest_prompt

    ids, why_not = _memorised_ids(run.config, run.report)
    if why_not:
        raise ConfigError(f"--line cannot be found: {why_not}")
    if (place := locate(ids, line)) is None:
        raise ConfigError(f"--line={line!r} is not in the memorised text, or at its very beginning alone")
    start, end = place
    count = shortest_prompt(run.model, ids, start, end, context_length=run.config.context_length)
    if count is None:
        tried = min(start, run.config.context_length)
        print(f"none of the prompts of 1 to {tried} tokens before it brings it back")
    else:
        print(f"{count} tokens bring it back: {decode(ids[start - count : start])!r}")


def _write_page(run: "Run", options: ScoreOptions) -> None:
    """The recitation, made again from the weights and the text, as one HTML file. Raises ConfigError."""
    from nanogpt.evaluate.verify import one_process, score_run
    from nanogpt.plots.recall_html import make_page
    from nanogpt.plots.recall_map import headline

    to = options.html
    ids, why_not = _memorised_ids(run.config, run.report)
    if why_not:
        raise ConfigError(f"--html={to} cannot be made: {why_not}")
    card = score_run(run, ids, one_process())
    with _as_reported(options.run_dir):
        page = make_page(card.recited, headline(run.config.data, run.report | card.values()))
    try:
        user_path(to, f"--html={to}").write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ConfigError(f"--html={to} cannot be written: {error.strerror or error}") from None
    print(f"{to}: open it in a browser", file=sys.stderr)


@dataclass(frozen=True)
class VerifyOptions(Options):
    """What `verify` is asked."""

    run_dir: str = option(MISSING, "directory of a finished run")


def verify(options: VerifyOptions) -> int:
    """Compute every score of report.json again from the weights and the text; status 1 where one differs."""
    from nanogpt.data.corpus import read_corpus
    from nanogpt.evaluate.verify import verify as checks
    from nanogpt.storage.run_dir import load_run, run_directory

    run = load_run(options.run_dir)
    if run.report.get("recall") is None:
        raise ConfigError(f"{options.run_dir} has no scores: the run ended with {run.report.get('exit_reason')}")
    differing = []
    for check in checks(run, run_directory(options.run_dir), read_corpus(run.config.data)):
        verdict = "fits   " if check.fits else "DIFFERS"
        print(f"{verdict} {check.name}: stated {check.stated}, found {check.found}", flush=True)
        if not check.fits:
            differing.append(check.name)
    if differing:
        print(f"NOT verified: {', '.join(differing)}", file=sys.stderr)
        return 1
    print(
        f"verified, in {run.report['scores_precision']}: all that the weights and the text can confirm; steps, clocks, "
        f"engine and versions are not in them"
    )
    return 0


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """What `checkpoint` is asked."""

    action: Literal["verify"] = option(MISSING, "read every byte of every checkpoint and compare it with its manifest")
    run_dir: str = option(MISSING, "directory of a run")


def checkpoint(options: CheckpointOptions) -> int:
    """Which checkpoints of a run are intact, the newest first; status 1 when the newest is not."""
    from nanogpt.storage.checkpoint import examine

    examined = list(examine(user_path(options.run_dir, options.run_dir)))
    if not examined:
        raise ConfigError(f"{options.run_dir} holds no checkpoint")
    for name, found in examined:
        print(name, found if isinstance(found, CheckpointError) else "is intact")
    return int(isinstance(examined[0][1], CheckpointError))


@dataclass(frozen=True)
class PlotOptions(Options):
    """What `plot` is asked."""

    run_dir: tuple[str, ...] = option(MISSING, "directories of runs, which may be running still")
    out: str = option("loss.png", "the picture, a .png, .svg or .pdf")


def plot(options: PlotOptions) -> int:
    """The loss of one run or of several in one picture, against steps and against time, with what differs named."""
    from nanogpt.plots.loss_plot import FORMATS, draw, save
    from nanogpt.plots.run_history import read_curve

    out = user_path(options.out, f"--out={options.out}")
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out={options.out} must end in one of {', '.join(FORMATS)}")
    curves = [read_curve(run_dir) for run_dir in options.run_dir]
    for curve in curves:
        if not curve.steps:
            raise ConfigError(f"{curve.name} has logged no step yet")
    try:
        save(draw(curves), out)
    except ImportError as error:
        raise ConfigError(f"no picture without matplotlib ({error}): pip install matplotlib") from None
    except OSError as error:
        raise ConfigError(f"--out={options.out} cannot be written: {error.strerror or error}") from None
    except Exception as error:  # of matplotlib's: they have no common base
        raise ConfigError(f"--out={options.out} cannot be drawn: {one_line(error)}") from None
    print(f"{options.out} shows {len(curves)} runs" if len(curves) > 1 else f"{options.out} shows {curves[0].name}")
    return 0


@dataclass(frozen=True)
class ExportOptions(Options):
    """What `export` is asked."""

    run_dir: str = option(MISSING, "directory of a finished run")
    out: str = option(MISSING, "directory to write, which must not hold files yet")
    format: Literal["hf"] = option("hf", "hf: what transformers' Auto classes load, weights and tokenizer")


def export(options: ExportOptions) -> int:
    """The model of a finished run for other software; train_overfit.py --init_from=OUT goes on from it."""
    from safetensors import SafetensorError

    from nanogpt.storage.hf import write_hf
    from nanogpt.storage.run_dir import load_run

    run, out = load_run(options.run_dir), user_path(options.out, options.out)
    try:
        write_hf(run.model, out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{out} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    print(f"{out}: for transformers.AutoModelForCausalLM and AutoTokenizer, and for --init_from")
    return 0


@dataclass(frozen=True)
class PreflightOptions(TrainConfig):
    """What `preflight` is asked: the options of train_overfit.py, and on how many ranks."""

    ranks: int = option(1, "processes that would train", "ranks")


def preflight(options: PreflightOptions) -> int:
    """Whether a run could reach its target, what each engine would need of memory, how long it may take."""
    from nanogpt.commands.preflight import tell

    config = TrainConfig(**{f.name: getattr(options, f.name) for f in fields(TrainConfig)})
    return tell(config, ranks=options.ranks)


COMMANDS = {
    "recite": (ReciteOptions, recite),
    "score": (ScoreOptions, score),
    "verify": (VerifyOptions, verify),
    "checkpoint": (CheckpointOptions, checkpoint),
    "export": (ExportOptions, export),
    "plot": (PlotOptions, plot),
    "preflight": (PreflightOptions, preflight),
    "repeat": (RepeatOptions, repeat),
}


def run() -> int:
    """The command that the first word names, with the options that follow."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(f"{__doc__ or ''}\ncommands: {', '.join(COMMANDS)}; python -m nanogpt COMMAND --help")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}: one of {', '.join(COMMANDS)}")
    options, command = COMMANDS[name]
    return command(parse(options, argv, program=f"python -m nanogpt {name}", about=command.__doc__))


if __name__ == "__main__":
    main(run)
