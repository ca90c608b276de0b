"""The tables of docs/reference, from the code that they describe.

python docs/tables.py options
python docs/tables.py commands
python docs/tables.py metrics
python docs/tables.py report
python docs/tables.py config
python docs/tables.py exit_reasons
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanogpt.__main__ import COMMANDS
from nanogpt.config.options import Options, describe_type, option_types
from nanogpt.config.train_config import TrainConfig
from nanogpt.monitor.loggers import Row
from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.report import Report
from nanogpt.training.report import EXIT_STATUS

FILES = {"report": Report, "config": RunInfo, "metrics": Row}
KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def keys(cls: type) -> str:
    """The keys of a dataclass in Markdown, in the order of the file."""
    return "\n".join(["| key | value | what it is |", "|---|---|---|", *_rows(cls, "", set())])


def options() -> str:
    """The options of a run, a table for each group."""
    groups: dict[str, list[str]] = {}
    for f, kind in option_types(TrainConfig):
        groups.setdefault(f.metadata["group"], []).append(_option(f, kind))
    head = ["| option | value | default | what it is |", "|---|---|---|---|"]
    tables = ["\n".join([f"### {name}", "", *head, *rows]) for name, rows in groups.items()]
    presets = ["### Presets, whose options can be given as well", "", "| preset | options |", "|---|---|"]
    for name, values in TrainConfig.presets.items():
        presets.append(f"| `--preset={name}` | {' '.join(f'`--{o}={value}`' for o, value in values.items())} |")
    return "\n\n".join([*tables, "\n".join(presets)])


def commands() -> str:
    """Each command, its arguments and the options that no run has."""
    lines = ["| command | what it does | arguments and options of its own |", "|---|---|---|"]
    for name in COMMANDS:
        module = import_module(f"nanogpt.commands.{name}")
        command = getattr(module, name)
        cls = TrainConfig if name == "train" else get_type_hints(command)["options"]
        about = ((module if name == "train" else command).__doc__ or "").strip().splitlines()[0]
        lines.append(f"| `nanogpt {name}` | {about} | {'<br>'.join(_own(cls))} |")
    return "\n".join(lines)


def exit_reasons() -> str:
    """How a run can end, and with which status."""
    rows = [f"| `{reason}` | {status} |" for reason, status in EXIT_STATUS.items()]
    return "\n".join(["| `exit_reason` | exit status |", "|---|---|", *rows])


def _own(cls: type[Options]) -> Iterator[str]:
    """What a command takes; of a run's options only that it takes them."""
    if issubclass(cls, TrainConfig):
        yield "[the options of a run](options.md)"
    for f, kind in option_types(cls):
        if cls is TrainConfig or f in fields(TrainConfig):
            continue
        choices = f", {_value(f, kind)}" if get_origin(kind) is Literal or f.metadata["unit"] else ""
        several = "..." if get_origin(kind) is tuple else ""
        name = f"`{f.name.upper()}{several}`" if f.default is MISSING else f"`--{f.name}`"
        default = "" if f.default is MISSING else f" (default {_default(f)})"
        yield f"{name}{choices}{default}: {_doc(f)}"


def _option(f: Field[Any], kind: Any) -> str:
    fixed = "" if f.metadata["may_change"] else " *"
    return f"| `--{f.name}`{fixed} | {_value(f, kind)} | {_default(f)} | {_doc(f)} |"


def _value(f: Field[Any], kind: Any) -> str:
    """What an option takes: its choices, or its type and unit."""
    unit = f", {f.metadata['unit']}" if f.metadata["unit"] else ""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    words = {"int": "whole number", "float": "number", "str": "text"}
    return " or ".join(words.get(word, word) for word in describe_type(kind).split(" or ")) + unit


def _default(f: Field[Any]) -> str:
    return "none" if f.default is None else str(f.default)


def _doc(f: Field[Any]) -> str:
    return str(f.metadata["doc"]).replace("|", "\\|")


def _rows(cls: Any, place: str, known: set[type], *, may_lack: bool = False) -> Iterator[str]:
    """A row for each key of cls and of what is within it; known: the dataclasses that have had their rows."""
    known.add(cls)
    hints = get_type_hints(cls)
    for f in fields(cls):
        if not f.metadata:
            continue
        kind = hints[f.name]
        if NoneType in get_args(kind):
            kind = next(each for each in get_args(kind) if each is not NoneType)
        nullable = NoneType in get_args(hints[f.name]) and not f.metadata["added"]
        if f.metadata["merged"]:
            yield from _rows(kind, place, known, may_lack=may_lack or nullable)
            continue
        lacks = may_lack or f.metadata["omitted"]
        alternative = " or null" if nullable and not f.metadata["omitted"] else ""
        described = f"{_describe(kind)}{alternative}{', its keys as above' if kind in known else ''}"
        yield f"| `{place}{f.name}`{' *' if lacks else ''} | {described} | {f.metadata['doc']} |"
        if is_dataclass(kind) and kind not in known:
            yield from _rows(kind, f"{place}{f.name}.", known, may_lack=lacks)


def _describe(kind: Any) -> str:
    """A type as JSON has it."""
    if get_origin(kind) is tuple:
        return f"list of {_describe(get_args(kind)[0])}"
    if is_dataclass(kind) or get_origin(kind) in (Mapping, dict):
        return "object"
    if issubclass(kind, Enum):
        return ", ".join(f"`{each.value}`" for each in kind)
    return KINDS[kind]


if __name__ == "__main__":
    what = sys.argv[1]
    tables = {"options": options, "commands": commands, "exit_reasons": exit_reasons}
    print(keys(FILES[what]) if what in FILES else tables[what]())
