"""JSON that any program reads: no NaN, no Infinity, no half-written file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import read_file, whole

DEEPEST = 100  # levels of a file that is read; no file of ours has ten


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
        raise ConfigError(f"{path}: no such file: is {path.parent} {of}?")
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


def _values(container: dict[str, Any] | list[Any]) -> Any:
    return container.values() if isinstance(container, dict) else container


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
