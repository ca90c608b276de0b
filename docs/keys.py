"""The keys of a run directory's JSON files as a table, from the dataclasses that write them.

python docs/keys.py report
python docs/keys.py config
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanogpt.storage.provenance import RunInfo
from nanogpt.storage.report import Report

FILES = {"report": Report, "config": RunInfo}
KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def table(cls: type) -> str:
    """The keys of a dataclass in Markdown, in the order of the file."""
    return "\n".join(["| key | value | what it is |", "|---|---|---|", *_rows(cls, "", set())])


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
    if is_dataclass(kind) or get_origin(kind) is Mapping:
        return "object"
    if issubclass(kind, Enum):
        return ", ".join(f"`{each.value}`" for each in kind)
    return KINDS[kind]


if __name__ == "__main__":
    print(table(FILES[sys.argv[1]]))
