"""Greedy continuation of a prompt by the model of a finished run.

python -m nanogpt recite out --prompt="Let us kill him, " --max_tokens=100
"""

import codecs
import sys
from dataclasses import MISSING, dataclass
from itertools import islice

from nanogpt.config.cli import printable
from nanogpt.config.options import Options, option, require_positive
from nanogpt.evaluate.recite import continue_text, prompt_and_text, verdict
from nanogpt.storage.run_dir import load_run


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
    """Continue a prompt greedily, and compare it on stderr with the text that the run memorised."""
    run = load_run(options.run_dir)
    prompt, memorised, why_not = prompt_and_text(run, options.prompt)
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character
    said = b""
    print(prompt, end="", flush=True)
    # Not the tokens that only say the end of the prompt again.
    pieces = filter(None, continue_text(run.model, prompt, context_length=run.config.context_length))
    for piece in islice(pieces, options.max_tokens):
        said += piece
        print(utf8.decode(piece), end="", flush=True)
    print(utf8.decode(b"", final=True))
    if why_not:
        compared = f"[not compared: {printable(why_not)}]"
    else:
        compared = verdict(prompt.encode(), said, memorised, goes_round=run.config.phase == "random")
    print(compared, file=sys.stderr)
    return 0
