"""Continuations of a prompt drawn from the model of a finished run, with what is verbatim in them marked.

python -m nanogpt sample out --prompt="Let us kill him, " --temperature=1.5 --num_samples=3
"""

import codecs
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from itertools import islice

import numpy as np
import torch

from nanogpt.config.cli import printable
from nanogpt.config.errors import ConfigError
from nanogpt.config.options import Options, option, require_positive
from nanogpt.evaluate.recite import continue_text, prompt_and_text
from nanogpt.evaluate.verbatim import Verbatim, summary
from nanogpt.model.sampler import make_sampler
from nanogpt.storage.run_dir import load_run
from nanogpt.utils.console import wants_colour

COLDEST, HOTTEST = 1e-6, 1e6  # logits divided by what is far outside overflow
GREEN_CYAN = (32, 36)  # stretches in turn: where one follows another, the model has gone on elsewhere in the text


@dataclass(frozen=True)
class SampleOptions(Options):
    """What `sample` is asked."""

    run_dir: str = option(MISSING, "directory of a finished run")
    prompt: str | None = option(None, "text to go on from; none: the beginning of the memorised text")
    temperature: float = option(1.0, "divides the logits; 1: as the model predicts, 0: the likeliest token each time")
    top_k: int | None = option(None, "draw from so many of the likeliest tokens; none: from all", "tokens")
    top_p: float | None = option(None, "draw from the likeliest tokens that have this probability; none: from all")
    seed: int = option(0, "of the draws")
    num_samples: int = option(1, "how many continuations; each is the same whatever their number", "samples")
    max_tokens: int = option(100, "how long a sample is", "tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "top_k", "num_samples", "max_tokens")
        if self.temperature != 0 and not COLDEST <= self.temperature <= HOTTEST:
            raise ConfigError(f"--temperature={self.temperature} must be 0, or from {COLDEST:f} to {HOTTEST:.0f}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p={self.top_p} must be more than 0, and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed={self.seed} must be from 0 to 2**63 - 1")


def sample(options: SampleOptions) -> int:
    """Draw continuations of a prompt, and mark what stands verbatim in the text that the run memorised."""
    run = load_run(options.run_dir)
    prompt, memorised, why_not = prompt_and_text(run, options.prompt)
    if why_not:
        print(f"[not marked: {printable(why_not)}]", file=sys.stderr)
    colour = wants_colour(sys.stdout)
    samples = []
    for number in range(1, options.num_samples + 1):
        if options.num_samples > 1:
            print(f"=== sample {number} ===")
        print(prompt, end="", flush=True)
        # Hashed: torch's generator takes 32 bits of a seed, and seed + number would repeat another seed's samples.
        seed = int(np.random.default_rng([options.seed, number]).integers(2**63))
        choose = make_sampler(
            torch.Generator().manual_seed(seed),
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        )  # fmt: skip
        pieces = continue_text(run.model, prompt, context_length=run.config.context_length, choose=choose)
        samples.append(Verbatim(memorised))
        # Not the tokens that only say the end of the prompt again.
        for text in painted(samples[-1].mark(islice(filter(None, pieces), options.max_tokens)), colour=colour):
            print(text, end="", flush=True)
        print(flush=True)
        if not why_not:
            which = f"sample {number}: " if options.num_samples > 1 else ""
            print(f"[{which}{summary(samples[-1])}]", file=sys.stderr)
    if options.num_samples > 1 and not why_not:
        print(f"[all {options.num_samples} samples: {summary(*samples)}]", file=sys.stderr)
    return 0


def painted(parts: Iterable[tuple[bytes, int]], *, colour: bool) -> Iterator[str]:
    """What Verbatim.mark yields as text, a stretch in a colour, else as [[this]].

    A token may end within a character, which is then said with the token that completes it.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    before = 0
    for piece, stretch in parts:
        text = utf8.decode(piece)
        if colour:
            # Each piece by itself: whatever ends the command leaves the terminal as it was.
            yield f"\x1b[{GREEN_CYAN[(stretch - 1) % 2]}m{text}\x1b[0m" if stretch and text else text
        else:
            yield _brackets(before, stretch) + text
        before = stretch
    yield utf8.decode(b"", final=True) + ("" if colour else _brackets(before, 0))


def _brackets(before: int, after: int) -> str:
    """Between two stretches, or what is in none (0)."""
    return "]]" * (before > 0 and before != after) + "[[" * (after > 0 and before != after)
