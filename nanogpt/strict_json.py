"""JSON that any program reads: no NaN, no Infinity, no half-written file."""

import json
import math
import os
from pathlib import Path
from typing import Any

from nanogpt.errors import ConfigError


def finite(value: Any) -> Any:
    """value with every float that is not finite, at any depth, as None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str) -> Any:
    """What text holds. Raises ValueError where it is no JSON; NaN and Infinity are none, though Python reads them."""
    return json.loads(text, parse_constant=_refuse)


def read_json(path: Path, *, of: str) -> dict[str, Any]:
    """What path holds, a file of what `of` says. Raises ConfigError when it is missing or damaged."""
    try:
        if isinstance(content := parse_json(path.read_text(encoding="utf-8")), dict):
            return content
        raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: is {path.parent} {of}?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def write_json(path: Path, content: dict[str, Any], *, exclusive: bool = False) -> None:
    """Write content to path, whole or not at all; exclusive: only if there is none yet, else FileExistsError."""
    text = json.dumps(finite(content), indent=2, allow_nan=False) + "\n"
    if exclusive:
        with path.open("x", encoding="utf-8") as file:  # fails, unlike a rename, when another process was first
            try:
                file.write(text)
                file.flush()
            except OSError:  # a full disk
                path.unlink()
                raise
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
