"""JSON that any program reads: no NaN, no Infinity, no half-written file; and files of JSON that a dataclass describes.

@dataclass(frozen=True, kw_only=True)
class Report(JsonFile):
    steps: int = key("updates made")

Report(steps=3).write(path)
Report.read(path, of="a run").steps
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import read_file, whole

DEEPEST = 100  # levels of a file that is read; no file of ours has ten
FORMAT_VERSION = 1  # of the files that a dataclass describes; a key more is no new version, another meaning is
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
T = TypeVar("T")
File = TypeVar("File", bound="JsonFile")


class SchemaError(ValueError):
    """JSON that is not what a dataclass describes; the message says in one line at which key, and how."""


class NewerFormatError(ConfigError):
    """A file of a version that this program does not know."""


def key(doc: str, *, default: Any = MISSING, added: bool = False, merged: bool = False, omitted: bool = False) -> Any:
    """A field that stands in a JSON file; doc: what it is, in one sentence with its unit, for the documentation.

    default: what a file that lacks it is read with; without one it must be there. added: files of earlier versions lack
    it, and are read with None, which no file of this version has. merged: a dataclass whose keys stand beside those of
    its owner. omitted, merged: None is written as no key at all.
    """
    default = None if added else default
    return field(default=default, metadata={"doc": doc, "added": added, "merged": merged, "omitted": omitted or merged})


@dataclass(frozen=True, kw_only=True)
class JsonFile:
    """What a JSON file holds. Fields without key() are not in the file."""

    format_version: int = key("of this file; a file without it is of version 1", default=FORMAT_VERSION)

    @classmethod
    def find(cls: type[File], path: Path) -> File | None:
        """What path holds; None where there is no such file.

        Raises NewerFormatError, or ConfigError where the file is damaged or holds something else.
        """
        if (content := find_known(path)) is None:
            return None
        try:
            return from_json(cls, content)
        except SchemaError as error:
            raise no_run(path, error) from None

    @classmethod
    def read(cls: type[File], path: Path, *, of: str) -> File:
        """The same; where there is no such file ConfigError too. of: what has such a file, for the message."""
        if (found := cls.find(path)) is None:
            raise _missing(path, of)
        return found

    def write(self, path: Path, *, exclusive: bool = False) -> None:
        """Write it to path, as write_json does."""
        write_json(path, self.to_json(), exclusive=exclusive)

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        content: dict[str, Any] = to_json(self)
        return content


def find_known(path: Path) -> dict[str, Any] | None:
    """The JSON object in path, of a version that is known; None where there is no such file.

    Raises NewerFormatError, or ConfigError where the file is damaged.
    """
    content = find_json(path)
    version = FORMAT_VERSION if content is None else content.get("format_version", FORMAT_VERSION)
    if type(version) is not int:
        raise no_run(path, f"format_version is {version!r}, not a whole number")
    if not 1 <= version <= FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has format_version {version}, {FORMAT_VERSION} is the newest known here: use the version of "
            f"nanogpt-overfit that wrote it"
        )
    return content


def no_run(path: Path, why: object) -> ConfigError:
    """That path holds no file of a run; why: in one line."""
    return ConfigError(f"{path} is not a run's: {why}")


def to_json(value: Any) -> Any:
    """value, dataclasses within it by their keys, as what JSON knows."""
    if is_dataclass(value):
        content: dict[str, Any] = {}
        for f in fields(value):
            inner = getattr(value, f.name)
            if not f.metadata or (inner is None and f.metadata["omitted"]):
                continue
            content |= to_json(inner) if f.metadata["merged"] else {f.name: to_json(inner)}
        return content
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {name: to_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    return finite(value)


def from_json(cls: type[T], content: dict[str, Any], place: str = "") -> T:
    """The dataclass cls of what its keys have in content; others are left. Raises SchemaError.

    place: where content stands in its file, as 'recall.', for the message.
    """
    hints = get_type_hints(cls)
    values = {}
    for f in fields(cls):  # type: ignore[arg-type]
        if not f.metadata:
            continue
        kind = hints[f.name]
        if f.metadata["merged"]:
            inner = _dataclass_in(kind)
            if f.default is MISSING or content.keys() & keys_of(inner):
                values[f.name] = from_json(inner, content, place)
        elif f.name in content:
            values[f.name] = _typed(kind, content[f.name], place + f.name)
        elif f.default is MISSING:
            raise SchemaError(f"it has no {place}{f.name}")
    return cls(**values)


def keys_of(cls: Any) -> set[str]:
    """The keys that a dataclass has in JSON, without those within them."""
    names = set()
    hints = get_type_hints(cls)
    for f in fields(cls):
        if f.metadata and f.metadata["merged"]:
            names |= keys_of(_dataclass_in(hints[f.name]))
        elif f.metadata:
            names.add(f.name)
    return names


def _dataclass_in(kind: Any) -> type[Any]:
    """The dataclass that an annotation names, alone or beside None."""
    return next(cast(type[Any], each) for each in (kind, *get_args(kind)) if is_dataclass(each))


def _typed(kind: Any, value: Any, place: str) -> Any:
    """value, of JSON, as a kind of a field's annotation. Raises SchemaError where it is none."""
    choices = get_args(kind)
    if NoneType in choices:
        return None if value is None else _typed(next(c for c in choices if c is not NoneType), value, place)
    if kind is object:
        return value
    if is_dataclass(kind) or get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            raise SchemaError(f"{place} is {value!r}, not an object")
        if is_dataclass(kind):
            return from_json(cast(type[Any], kind), value, place + ".")
        return {name: _typed(choices[1], inner, f"{place}.{name}") for name, inner in value.items()}
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise SchemaError(f"{place} is {value!r}, not a list")
        return tuple(_typed(choices[0], inner, f"{place}[{index}]") for index, inner in enumerate(value))
    if issubclass(kind, Enum):
        names = [each.value for each in kind]
        if value not in names:
            raise SchemaError(f"{place} is {value!r}, not one of {', '.join(names)}")
        return kind(value)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise SchemaError(f"{place} is {value!r}, not {KINDS[kind]}")
    return value


def finite(value: Any) -> Any:
    """value with every float that is not finite, at any depth, as None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What text holds, UTF-8 where it is bytes; make_object: as json's object_pairs_hook.

    Raises ValueError where it is no JSON, NaN and Infinity, which Python reads, among that, or nested too deeply.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        content = json.loads(text, parse_constant=_refuse, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [content]
    for _ in range(DEEPEST):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _values(outer)]
    if level:  # whoever walks through it would meet Python's own limit
        raise ValueError("it is nested too deeply")
    return content


def find_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in path; None where there is no such file. Raises ConfigError when it is damaged."""
    try:
        if isinstance(content := parse_json(read_file(path)), dict):
            return content
        raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_json(path: Path, *, of: str) -> dict[str, Any]:
    """What path holds, a file of what `of` says. Raises ConfigError when it is missing or damaged."""
    if (content := find_json(path)) is None:
        raise _missing(path, of)
    return content


def write_json(path: Path, content: dict[str, Any], *, exclusive: bool = False) -> None:
    """Write content to path, whole or not at all; exclusive: only if there is none yet, else FileExistsError."""
    text = (json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode()
    if exclusive:
        with path.open("xb") as file:  # fails, unlike a rename, when another process was first
            try:
                file.write(text)
                file.flush()
            except OSError:  # a full disk
                path.unlink()
                raise
        return
    with whole(path) as file:
        file.write(text)


def _missing(path: Path, of: str) -> ConfigError:
    return ConfigError(f"{path}: no such file: is {path.parent} {of}?")


def _values(container: dict[str, Any] | list[Any]) -> Any:
    return container.values() if isinstance(container, dict) else container


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
