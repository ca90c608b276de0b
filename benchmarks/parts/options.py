"""The options that benchmarks share, where a result goes, and how a program begins.

@dataclass(frozen=True)
class StallOptions(BenchmarkOptions):
    steps: int = option(64, "training steps", "steps")

run_benchmark(__file__, __doc__, StallOptions, measure, table)
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from nanogpt.config.cli import main, parse
from nanogpt.config.errors import ConfigError
from nanogpt.config.files import read_file
from nanogpt.config.options import Options, option, option_types, require_positive
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import parse_json, write_json
from parts import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
Chosen = TypeVar("Chosen", bound=Options)
MAKERS = {"amd", "intel", "nvidia", "apple", "r", "tm", "cpu", "processor"}  # words of a name that tell nothing apart


@dataclass(frozen=True)
class CheckedOptions(Options):
    """Options whose counts, all but a seed, are positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, *(f.name for f, kind in option_types(type(self)) if kind is int and f.name != "seed"))


@dataclass(frozen=True)
class BenchmarkOptions(CheckedOptions):
    """Of every benchmark: where its result goes, or which one to print."""

    out: str | None = option(None, "where the result goes; none: benchmarks/results/WHAT.MACHINE.DATE.json")
    table: str | None = option(None, "print this result in Markdown, and measure nothing")


@dataclass(frozen=True)
class ModelOptions(CheckedOptions):
    """The shape of a model, the default one."""

    n_layer: int = option(16, "transformer blocks", "blocks")
    n_head: int = option(12, "attention heads", "heads")
    n_embd: int = option(768, "width of the residual stream", "channels")

    @property
    def shape(self) -> dict[str, int]:
        """n_layer, n_head and n_embd."""
        return {f.name: getattr(self, f.name) for f in fields(ModelOptions)}


@dataclass(frozen=True)
class TaskOptions(ModelOptions):
    """A model and what it memorises."""

    context_length: int = option(64, "length of a training window", "tokens")
    subset_tokens: int = option(2048, "memorise the first N tokens", "tokens")

    @property
    def task(self) -> dict[str, int]:
        """The shape, context_length and subset_tokens."""
        return {f.name: getattr(self, f.name) for f in fields(TaskOptions)}


def task_option(name: str, default: int) -> Any:
    """The option of TaskOptions with another default."""
    known = TaskOptions.__dataclass_fields__[name].metadata
    return option(default, known["doc"], known["unit"])


def as_words(options: dict[str, Any]) -> list[str]:
    """The words of a command line that give these options."""
    return [f"--{name}={value}" for name, value in options.items()]


def result_path(what: str, device_name: str) -> Path:
    """Where a result goes that is made today: named by what it tells, the machine and the date."""
    return RESULTS / f"{what}.{machine(device_name)}.{date.today().isoformat()}.json"


def machine(device_name: str) -> str:
    """A device's name in a word or two: 'NVIDIA H200' is 'h200', 'AMD EPYC (family 26, model 2)' is 'zen5'."""
    if re.search(r"\bAMD\b.*\(family 26\b", device_name):
        return "zen5"
    words = re.findall(r"[a-z0-9]+", device_name.split(" (family")[0].lower())
    return "-".join(word for word in words if word not in MAKERS) or "cpu"


def read_result(path: Path) -> Any:
    """The JSON of a result. Raises ConfigError when it is missing or damaged."""
    try:
        return parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def run_script(script: str, about: str | None, cls: type[Chosen], work: Callable[[Chosen], int]) -> None:
    """Run work with the options of this command line and leave with its status; script: the program's __file__."""
    main(lambda: work(parse(cls, sys.argv[1:], program=f"benchmarks/{Path(script).name}", about=about)))


def run_benchmark(
    script: str,
    about: str | None,
    cls: type[Any],
    measure: Callable[[Any, Path], Any],
    table: Callable[[Any], str],
) -> None:
    """With --table=RESULT print that result; else measure, write the result as JSON and print it.

    measure: options and the result's file, which it may write before it is done -> the result. cls: a
    BenchmarkOptions. table: a result as JSON gives it back -> Markdown.
    """

    def work(options: BenchmarkOptions) -> int:
        if options.table:
            print(table(read_result(Path(options.table))))
            return 0
        out = Path(options.out) if options.out else result_path(Path(script).stem, World.from_env().device_name())
        if not out.parent.is_dir():
            raise ConfigError(f"--out={out}: there is no folder {out.parent}")
        if not options.out and out.exists():
            raise ConfigError(f"{out} is there, of today: name another --out, or that one")
        print(f"the result goes to {out}", file=sys.stderr, flush=True)
        write_json(out, measure(options, out))
        print(table(read_result(out)))
        return 0

    run_script(script, about, cls, work)
