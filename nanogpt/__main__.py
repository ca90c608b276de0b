"""Train a model until it has memorised a text, look at what it memorised, check it and export it.

python -m nanogpt train --out_dir=out
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

import time

LAUNCHED = time.perf_counter()  # before the imports

import sys  # noqa: E402
from importlib import import_module  # noqa: E402
from typing import get_type_hints  # noqa: E402

from nanogpt.config import cli  # noqa: E402
from nanogpt.config.errors import ConfigError  # noqa: E402

COMMANDS = ("train", "recite", "score", "verify", "checkpoint", "export", "plot", "preflight", "repeat")


def run() -> int:
    """The command that the first word names, with the options that follow; its module alone is imported."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(f"{__doc__ or ''}\ncommands: {', '.join(COMMANDS)}; python -m nanogpt COMMAND --help")
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
