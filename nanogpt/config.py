"""One frozen, documented, validated configuration of a training run.

    >>> TrainConfig(subset_tokens=4096, max_steps=100).batch_size
    16

This module imports no torch, so a wrong option is refused in a fraction of a second.
"""

from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nanogpt.errors import ConfigError

DEFAULT_SUBSET_TOKENS = 2048  # memorised in under 15 minutes on 2 CPU cores: docs/memorising.md


def option(default: Any, doc: str, unit: str = "") -> Any:
    """A dataclass field that --help documents: its default, or MISSING, one sentence, and the unit of its value."""
    return field(default=default, metadata={"doc": doc, "unit": unit})


@dataclass(frozen=True)
class Options:
    """Options of a command; strings, as a command line gives them, become the type of their field or are refused."""

    def __post_init__(self) -> None:
        for f, kind in option_types(type(self)):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), kind))


@dataclass(frozen=True)
class TrainConfig(Options):
    """What a run is. Two runs with the same TrainConfig on the same text follow the same curve."""

    # Text
    data: str = option("builtin", "builtin (scenes of Coriolanus), tinyshakespeare (downloaded once), or a UTF-8 file")
    subset_tokens: int | None = option(
        None, f"memorise the first N tokens; none: {DEFAULT_SUBSET_TOKENS}, or the whole of a shorter text", "tokens"
    )
    context_length: int = option(64, "length of a training window", "tokens")
    stride: int | None = option(None, "distance between the windows of one epoch; none: context_length", "tokens")
    phase: Literal["random", "fixed"] = option(
        "random", "shift the window grid each epoch, or leave it where it stands"
    )
    # Model
    n_layer: int = option(16, "transformer blocks", "blocks")
    n_head: int = option(12, "attention heads", "heads")
    n_embd: int = option(768, "width of the residual stream", "channels")
    block_size: int = option(1024, "learned positions; the longest possible context_length", "tokens")
    # Recipe
    batch_size: int = option(16, "windows in a global batch, whatever the number of ranks", "windows")
    micro_batch_size: int | None = option(
        None, "most windows a rank holds at once, to bound memory; none: all its share", "windows"
    )
    learning_rate: float = option(6e-4, "AdamW's learning rate")
    on_plateau: Literal["decay", "none"] = option(
        "decay", "below 8 x target (at most 1) let the rate fall with the square root of the loss, or not"
    )
    ema: float = option(0.97, "full passes judge an average of the weights over 1 / (1 - ema) steps; 0: the last ones")
    seed: int = option(0, "seeds weights and window order")
    # When to stop
    target_loss: float = option(0.099, "stop when a full pass over the subset verifies this mean loss", "nats/token")
    max_steps: int | None = option(None, "give up after this many updates; none: never", "steps")
    max_minutes: float | None = option(None, "give up after this long in training; none: never", "minutes")
    max_bad_steps: int = option(10, "fail after this many non-finite losses or gradients in a row", "steps")
    preflight: Literal["warn", "strict"] = option("warn", "on a target below the entropy floor: warn, or refuse")
    # Machine
    engine: Literal["auto", "single", "ddp"] = option("auto", "auto: ddp when there are several processes, else single")
    dtype: Literal["auto", "bf16", "fp32"] = option("auto", "compute in; auto: bf16 where the device does it well")
    compile: Literal["auto", "true", "false"] = option("auto", "torch.compile the model; auto: on CUDA")
    # Output
    out_dir: str = option("out", "run directory; must not hold a run yet")
    log_every: int = option(10, "a row in metrics.jsonl and a line on the terminal", "steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, *(f.name for f, kind in option_types(type(self)) if kind is not str and f.name not in ("seed", "ema"))
        )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed={self.seed} must be from 0 to 2**63 - 1")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"--ema={self.ema} must be from 0 to less than 1")
        if self.context_length < 2:
            raise ConfigError("--context_length=1 leaves nothing to recall: at least 2")
        if self.n_embd % self.n_head:
            raise ConfigError(f"--n_embd={self.n_embd} must be a multiple of --n_head={self.n_head}")
        if self.context_length > self.block_size:
            raise ConfigError(f"--context_length={self.context_length} must not exceed --block_size={self.block_size}")
        if self.stride is not None and self.stride > self.context_length:
            raise ConfigError(
                f"--stride={self.stride} would leave tokens between windows untrained: at most --context_length="
                f"{self.context_length}"
            )
        if self.subset_tokens is not None and self.subset_tokens <= self.context_length:
            raise ConfigError(
                f"--subset_tokens={self.subset_tokens} is shorter than one window: --context_length="
                f"{self.context_length} needs at least {self.context_length + 1}"
            )


def option_types(cls: type) -> list[tuple[Any, Any]]:
    """The (field, type) pairs of an options dataclass, in order of declaration."""
    hints = get_type_hints(cls)
    return [(f, hints[f.name]) for f in fields(cls)]


def describe_type(kind: Any) -> str:
    """How a type reads to a person: 'int', 'int or none', 'random|fixed'."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if choices := get_args(kind):
        return " or ".join("none" if choice is type(None) else choice.__name__ for choice in choices)
    return kind.__name__


def _typed(name: str, value: Any, kind: Any) -> Any:
    """value, a string of the command line or Python's own type, in its field's type; ConfigError if it is not."""
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
    """Raise ConfigError for the first of these options that is a number, but not a positive and finite one."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, int | float) and not (value > 0 and isfinite(value)):
            raise ConfigError(f"--{name}={value} must be a positive number")
