"""Commands on a finished run.

python -m nanogpt recite out --prompt="Let us kill him, " --max_tokens=100
"""

import codecs
import sys
from dataclasses import MISSING, dataclass
from itertools import islice

from nanogpt.cli import main, parse
from nanogpt.config import Options, option
from nanogpt.errors import ConfigError


@dataclass(frozen=True)
class ReciteOptions(Options):
    """What `recite` is asked."""

    run_dir: str = option(MISSING, "directory of a finished run")
    prompt: str = option("First Citizen:", "text to go on from")
    max_tokens: int = option(100, "how much to recite", "tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise ConfigError(f"--max_tokens={self.max_tokens} must be a positive number")


def recite(options: ReciteOptions) -> int:
    """Greedy continuation of a prompt, and on stderr how it compares with the text that the run memorised."""
    from nanogpt.corpus import read_corpus
    from nanogpt.recite import continue_text, verdict
    from nanogpt.run_dir import load_run
    from nanogpt.tokenizer import encode, encoding

    run = load_run(options.run_dir)
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character
    said = b""
    print(options.prompt, end="", flush=True)
    pieces = continue_text(run.model, options.prompt, context_length=run.config.context_length)
    for piece in islice(pieces, options.max_tokens):
        said += piece
        print(utf8.decode(piece), end="", flush=True)
    print(utf8.decode(b"", final=True))
    try:
        corpus = read_corpus(run.config.data)
    except ConfigError as error:
        print(f"[not compared with the text: {error}]", file=sys.stderr)
        return 0
    if corpus.sha256 != run.report.get("corpus_sha256"):
        print(f"[not compared: {run.config.data} has changed since the run]", file=sys.stderr)
        return 0
    memorised = encoding().decode_bytes(encode(corpus.text)[: run.config.subset_tokens])
    print(verdict(options.prompt.encode(), said, memorised), file=sys.stderr)
    return 0


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
