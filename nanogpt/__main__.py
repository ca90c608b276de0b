"""Train a model until it has memorised a text, look at what it memorised, check it and export it.

python -m nanogpt train --out_dir=out
python -m nanogpt recite out --prompt="Let us kill him, " --max_tokens=100
python -m nanogpt verify out
"""

import time

LAUNCHED = time.perf_counter()  # before the imports

import sys  # noqa: E402
from importlib import import_module  # noqa: E402
from typing import get_type_hints  # noqa: E402

from nanogpt.config import cli  # noqa: E402
from nanogpt.config.errors import ConfigError  # noqa: E402

# Each with what it does; here, as a command's module imports torch, for which nobody waits who asks for help.
COMMANDS = {
    "train": "Train until the target loss is verified.",
    "recite": "Continue a prompt from memory, and compare with the text.",
    "sample": "Draw continuations of a prompt, and mark what is verbatim.",
    "score": "Show what a run memorised, beside a text that it never saw.",
    "verify": "Compute every score of a run again, and name what differs.",
    "checkpoint": "Check which checkpoints of a run are intact.",
    "export": "Write a run's model for transformers.",
    "plot": "Draw the losses of one run or several in one picture.",
    "accept": "Say whether a cluster is fit to train: compute, break, prove.",
    "preflight": "Estimate whether a text can be memorised, the memory and the time.",
    "repeat": "Measure the time to target over several seeds.",
}


def run() -> int:
    """The command that the first word names, with the options that follow; its module alone is imported."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        listed = "\n".join(f"  {command:<12}{about}" for command, about in COMMANDS.items())
        print(
            f"{__doc__ or ''}\nusage: python -m nanogpt COMMAND [--option=value ...]\n\ncommands:\n{listed}\n\n"
            f"python -m nanogpt COMMAND --help lists the options of a command."
        )
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}: one of {', '.join(COMMANDS)}")
    program = f"python -m nanogpt {name}"
    module = import_module(f"nanogpt.commands.{name}")
    command = getattr(module, name)
    if name == "train":
        return int(command(argv, launched=LAUNCHED, program=program, about=module.__doc__ or ""))
    options = cli.parse(get_type_hints(command)["options"], argv, program=program, about=command.__doc__ or "")
    return int(command(options))


def main() -> None:
    """The console script `nanogpt`."""
    cli.main(run)


if __name__ == "__main__":
    main()
