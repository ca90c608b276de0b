"""Commands on a finished run.

python -m nanogpt recite out --prompt="Let us kill him, " --max_tokens=100
"""

import codecs
import sys
from dataclasses import MISSING, dataclass
from itertools import islice
from typing import Any

from nanogpt.cli import main, parse
from nanogpt.config import Options, TrainConfig, option, require_positive
from nanogpt.errors import ConfigError


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
    from nanogpt.data import hop_length
    from nanogpt.recite import continue_text, verdict
    from nanogpt.run_dir import load_run
    from nanogpt.tokenizer import encoding

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
    for piece in islice(continue_text(run.model, prompt, context_length=run.config.context_length), options.max_tokens):
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
    from nanogpt.corpus import read_corpus
    from nanogpt.tokenizer import encode

    try:
        corpus = read_corpus(config.data)
    except ConfigError as error:
        return [], str(error)
    if corpus.sha256 != report.get("corpus_sha256"):
        return [], f"{config.data} has changed since the run"
    return encode(corpus.text)[: config.subset_tokens], ""


COMMANDS = {"recite": (ReciteOptions, recite)}


def run() -> int:
    """The command that the first word names, with the options that follow."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)}; python -m nanogpt COMMAND --help")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}: one of {', '.join(COMMANDS)}")
    options, command = COMMANDS[name]
    return command(parse(options, argv, program=f"python -m nanogpt {name}", about=command.__doc__ or ""))


if __name__ == "__main__":
    main(run)
