"""A fault that a run is given on purpose, as a command line writes it.

>>> Fault.parse("kill:rank=1,step=12")
Fault(kind='kill', rank=1, step=12)
"""

import os
from dataclasses import dataclass

from nanogpt.config.errors import ConfigError

KINDS = ("kill", "freeze", "slow", "nan", "flip", "full_disk", "drop_gradient")
ALLOWED = "NANOGPT_ALLOW_FAULTS"


@dataclass(frozen=True)
class Fault:
    """What happens to one rank at one step."""

    kind: str  # of KINDS
    rank: int
    step: int  # counted from 1

    def __str__(self) -> str:
        return f"{self.kind}:rank={self.rank},step={self.step}"

    @property
    def needs_hooks(self) -> bool:
        """Whether it hooks a module or a gradient, which neither a compiled model nor a CUDA graph looks for."""
        return self.kind in ("slow", "nan", "drop_gradient")

    @classmethod
    def parse(cls, words: str) -> "Fault":
        """KIND:rank=R,step=S. Raises ConfigError."""
        kind, _, rest = words.partition(":")
        named = dict(word.split("=", 1) for word in rest.split(",") if "=" in word)
        right = kind in KINDS and rest.count(",") == 1 and named.keys() == {"rank", "step"}
        if not right or not all(value.isdecimal() for value in named.values()) or int(named["step"]) < 1:
            raise ConfigError(
                f"--inject={words} must be KIND:rank=R,step=S with a step from 1 on, KIND one of {', '.join(KINDS)}"
            )
        return cls(kind, int(named["rank"]), int(named["step"]))


def check_fault(fault: Fault, ranks: int) -> None:
    """Refuse one that nobody meant to have, or that none of so many ranks would. Raises ConfigError."""
    if os.environ.get(ALLOWED) != "1":
        raise ConfigError(f"--inject={fault} breaks the run on purpose: set {ALLOWED}=1 if that is what you want")
    if fault.rank >= ranks:
        raise ConfigError(f"--inject={fault}: the last rank here is {ranks - 1}")
