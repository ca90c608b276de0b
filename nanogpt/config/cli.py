"""Strict command lines: python-fire splits the words, a frozen dataclass says which are allowed.

    options = parse(TrainConfig, ["--max_steps=10"], program="train_overfit.py", about="...")

Fire alone calls first and complains of a misspelt flag afterwards (python-fire issue 168), and it guesses types from
the look of a value. Here every word is refused or typed before anything starts.
"""

import difflib
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import TypeVar, get_origin

import fire
from fire.decorators import SetParseFn

from nanogpt.config.errors import ConfigError, ReplicaError, RunError
from nanogpt.config.options import Options, describe_type, option_types
from nanogpt.utils.console import OutputLost, ReaderLeft, standard_streams

Parsed = TypeVar("Parsed", bound=Options)
READER_LEFT = 128 + signal.SIGPIPE  # what a shell shows of a program that SIGPIPE ended, which Python ignores
SILENCE_S = 10.0  # that other ranks keep before they say what is wrong


def parse(cls: type[Parsed], argv: Sequence[str], *, program: str, about: str | None) -> Parsed:
    """The options dataclass cls, filled from argv. Prints help and leaves with status 0 on --help or -h.

    Fields without a default are positional, in order; one that is a tuple, which must be the last, takes all words
    that are left. Raises ConfigError on the first word that does not fit.
    """
    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(help_text(cls, program=program, about=about), flush=True)
        raise SystemExit(0)
    _check_form(argv)
    words: list[str] = []
    flags: dict[str, str | tuple[str, ...]] = {}

    def collect(*positional: str, **named: str) -> None:
        words.extend(positional)
        flags.update(named)

    # Every value stays the string that was typed: the dataclass knows its type, fire could only guess it.
    fire.Fire(SetParseFn(str)(collect), command=list(argv), name=program)
    names = [f.name for f, _ in option_types(cls)]
    preset = flags.pop("preset", None) if cls.presets else None
    for name in flags:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists the options"
            raise ConfigError(f"unknown option --{name}: {hint}")
    positional = [(f.name, kind) for f, kind in option_types(cls) if f.default is MISSING]
    takes_several = bool(positional) and get_origin(positional[-1][1]) is tuple
    if len(words) > len(positional) and not takes_several:
        raise ConfigError(f"unexpected argument {words[len(positional)]!r}: options are written --name=value")
    for i, (name, kind) in enumerate(positional[: len(words)]):
        if name in flags:
            raise ConfigError(f"unexpected argument {words[i]!r}: --{name} is given too")
        flags[name] = tuple(words[i:]) if get_origin(kind) is tuple else words[i]
    if takes_several and not words:
        flags.setdefault(positional[-1][0], ())  # whether none are allowed is the command's to say
    if missing := [name for name, _ in positional if name not in flags]:
        raise ConfigError(f"{missing[0].upper()} is missing: {program} --help shows the usage")
    return cls(**flags) if preset is None else cls.preset(str(preset), **flags)


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """argv without the --local_rank=N that the deepspeed launcher adds, which says no more than LOCAL_RANK does.

    Any other --local_rank stays, and is refused as the unknown option that it is.
    """
    words = list(argv)
    if "LOCAL_RANK" in os.environ and (added := f"--local_rank={os.environ['LOCAL_RANK']}") in words:
        words.remove(added)  # once: a second one is a person's
    return words


def help_text(cls: type, *, program: str, about: str | None) -> str:
    """Every option of cls with its type, default, unit and sentence, by groups, wrapped to the terminal."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    required = "".join(
        f" {f.name.upper()}{'...' * (get_origin(kind) is tuple)}"
        for f, kind in option_types(cls)
        if f.default is MISSING
    )
    lines = [*([about, ""] if about else ()), f"usage: {program}{required} [--option=value ...]", ""]
    groups = list(dict.fromkeys(f.metadata["group"] for f in fields(cls)))
    group = ""
    for f, kind in sorted(option_types(cls), key=lambda each: groups.index(each[0].metadata["group"])):
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines.append(f"{group}:")
        name = f.name.upper() if f.default is MISSING else f"--{f.name}"
        default = "required" if f.default is MISSING else f"default {'none' if f.default is None else f.default}"
        unit = f", {f.metadata['unit']}" if f.metadata["unit"] else ""
        lines.append(f"  {name}  ({describe_type(kind)}{unit}; {default})")
        lines += textwrap.wrap(f.metadata["doc"], width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, *_presets_text(cls, width)])


def _presets_text(cls: type[Options], width: int) -> Iterator[str]:
    if cls.presets:
        yield "Presets, whose options can be given as well:"
    for name, values in cls.presets.items():
        yield f"  --preset={name}"
        given = " ".join(f"--{option}={value}" for option, value in values.items())
        yield from textwrap.wrap(
            given, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )


def main(command: Callable[[], int]) -> None:
    """Run command and leave with its status: 2 and one line for a ConfigError, 1 for Ctrl-C or an output that is lost.

    Whatever an error's message quotes, it is one line. A reader who leaves is none: 141, in silence.
    """
    with standard_streams():
        status = _status(command)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # At once: gloo's threads outlive destroy_process_group (torch 2.13). On an overloaded machine ranks aborted
        # while Python ended ("terminate called without an active exception"): a verified run would have failed.
        os._exit(status)
    sys.exit(status)


def _status(command: Callable[[], int]) -> int:
    """Run command -> the status to leave with; an error is told."""
    rank = os.environ.get("RANK", "0")
    try:
        status = command()
        sys.stdout.flush()  # what cannot be written is met here at the latest
        return status
    except ConfigError as error:
        if rank != "0":
            # The first rank has usually met the same mistake, says so and leaves, and torchrun ends the others within
            # this time. Where it has not, because only this node lacks a file or a GPU, this rank must speak.
            time.sleep(SILENCE_S)
        told = printable(str(error))
        print(f"error: {told}" if rank == "0" else f"error (rank {rank}): {told}", file=sys.stderr)
        return 2
    except ReplicaError as error:  # every rank raises the same
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(SILENCE_S)  # torchrun ends all ranks as soon as one leaves: let the first one speak
        return 1
    except RunError as error:
        if not error.is_told:
            named = f" (rank {error.rank})" if error.rank else ""
            print(f"error{named}: {printable(str(error))}", file=sys.stderr)
        return error.status
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        print(printable(error.code), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if rank == "0":
            print("interrupted", file=sys.stderr)
        os._exit(1)  # at once: libraries would wait for their servers and threads
    except ReaderLeft:
        return READER_LEFT
    except OutputLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def printable(text: str) -> str:
    """text with what is not printable written as in a Python string: a newline as \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _check_form(argv: Sequence[str]) -> None:
    """Refuse what fire would read its own way: separators, short flags, flags without a value, repeated ones."""
    seen: set[str] = set()
    for word, following in pairwise([*argv, "--"]):
        if word in ("-", "--") or word.startswith("--=") or re.match(r"-[^-\d.]", word):
            raise ConfigError(f"unexpected argument {word!r}: options are written --name=value")
        if not word.startswith("--"):
            continue
        name, equals, _ = word[2:].partition("=")
        if not equals and following.startswith("--"):
            raise ConfigError(f"--{name} needs a value: options are written --name=value")
        if name.replace("-", "_") in seen:
            raise ConfigError(f"--{name} is given twice")
        seen.add(name.replace("-", "_"))
