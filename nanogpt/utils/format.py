"""How figures read to a person.

percent(0.9996) == ">99.9%"
duration(600) == "10 min"
counted(1, "step") == "1 step"
last_names("/my/a.txt,/my/texts") == "a.txt, texts"
"""

from pathlib import Path


def percent(share: float) -> str:
    """A share that reads 0.0% or 100.0% only where it is none or all."""
    told = f"{share:.1%}"
    if told == "100.0%" and share < 1:
        return ">99.9%"
    return "<0.1%" if told == "0.0%" and share else told


def duration(seconds: float | None) -> str:
    """Seconds for a person: '45 s', '12 min', '3.2 h'."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counted(number: int, noun: str) -> str:
    """A number of things: '1 step', '1,000 steps'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def last_names(paths: str) -> str:
    """A path, or several that are absolute with commas between, by the last name of each."""
    return ", ".join(Path(path).name or path for path in paths.split(",/"))


def gigabytes(count: float) -> str:
    """A number of bytes for a person: '4.2 GB'."""
    return f"{count / 1e9:.1f} GB"
