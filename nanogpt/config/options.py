"""Options of a command: a frozen dataclass whose fields know their type, unit and sentence.

rate: float = option(6e-4, "of the optimizer")
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from nanogpt.config.errors import ConfigError

LARGEST = 2**31 - 1  # of a count, and of seconds: beyond it is a slip, and sizes and clocks overflow


Self = TypeVar("Self", bound="Options")


def option(
    default: Any, doc: str, unit: str = "", *, group: str = "", may_change: bool = False, shapes_curve: bool = True
) -> Any:
    """A dataclass field that --help documents: its default, or MISSING, one sentence, and the unit of its value.

    group: the heading that --help puts it under. may_change: a run may be resumed with another value. shapes_curve:
    a picture of two runs names it where they differ in it.
    """
    about = {"doc": doc, "unit": unit, "group": group, "may_change": may_change, "shapes_curve": shapes_curve}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Options:
    """Options of a command; strings, as a command line gives them, become the type of their field or are refused."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # values of options under a name, for --preset=NAME

    @classmethod
    def preset(cls: type[Self], name: str, **options: Any) -> Self:
        """The options of a preset, but for those given here. Raises ConfigError where there is no such preset."""
        if name not in cls.presets:
            raise ConfigError(f"--preset={name} must be one of {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **options})

    def __post_init__(self) -> None:
        for f, kind in option_types(type(self)):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), kind))


def option_types(cls: type) -> list[tuple[Any, Any]]:
    """The (field, type) pairs of an options dataclass, in order of declaration."""
    hints = get_type_hints(cls)
    return [(f, hints[f.name]) for f in fields(cls)]


def option_names(cls: type, **about: Any) -> frozenset[str]:
    """The names of the options of cls about which option() was told all this, such as may_change=True."""
    return frozenset(f.name for f in fields(cls) if about.items() <= f.metadata.items())


def describe_type(kind: Any) -> str:
    """How a type reads to a person: 'int', 'int or none', 'random|fixed'."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{describe_type(get_args(kind)[0])}, one or more"
    if choices := get_args(kind):
        return " or ".join("none" if choice is type(None) else choice.__name__ for choice in choices)
    return str(kind.__name__)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """value, a string of the command line or Python's own type, in its field's type; ConfigError if it is not."""
    if get_origin(kind) is tuple:
        return tuple(_typed(name, each, get_args(kind)[0]) for each in ([value] if isinstance(value, str) else value))
    mistake = ConfigError(f"--{name}={value!s} is not of type {describe_type(kind)}")
    if get_origin(kind) is Literal:
        if str(value).lower() not in get_args(kind):
            raise ConfigError(f"--{name}={value!s} must be one of {', '.join(get_args(kind))}")
        return str(value).lower()
    if type(None) in get_args(kind):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        kind = get_args(kind)[0]
    if kind is str:
        if not isinstance(value, str):
            raise mistake
        if not value:
            raise ConfigError(f"--{name}= needs a value")
        if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(f"--{name}={value!a} is not UTF-8")
        return value
    number = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not number or (kind is int and isinstance(value, float)):
        raise mistake
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise mistake from None


def require_positive(options: Options, *names: str) -> None:
    """Raise ConfigError for the first of these options that is a number, but not a positive and finite one.

    A count is LARGEST at most.
    """
    for name in names:
        value = getattr(options, name)
        if isinstance(value, int | float) and not (value > 0 and isfinite(value)):
            raise ConfigError(f"--{name}={value} must be a positive number")
        if isinstance(value, int) and value > LARGEST:
            raise ConfigError(f"--{name}={value} must be at most {LARGEST}")
