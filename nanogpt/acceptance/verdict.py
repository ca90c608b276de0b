"""What a stage of an acceptance says of a cluster: PASS, FAIL or UNKNOWN, with the figure and what it was held to.

Check.of([3], name="bf16 products", found="41 to 310 TFLOP/s", expected="70 % of the median, 310 TFLOP/s")
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from nanogpt.storage.json_file import key

SLOW = 0.7  # of the figure of its like, below which a rank or a link is named


class Verdict(str, Enum):
    """PASS is for what was measured and is right, never for what was not measured."""

    PASS = "PASS"
    FAIL = "FAIL"
    UNKNOWN = "UNKNOWN"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str = key("what was looked at")
    verdict: Verdict = key("PASS, FAIL, or UNKNOWN where it was not measured or there is nothing to hold it to")
    found: str = key("the figure with its unit, or why there is none")
    expected: str = key("what it was held to; empty where there is nothing")
    ranks: tuple[int, ...] = key("the ranks that are to blame, none where it is not known", default=())

    @classmethod
    def of(cls, blamed: Sequence[int] | bool, *, name: str, found: str, expected: str) -> "Check":
        """FAIL where ranks are blamed, or something is (True), else PASS."""
        ranks = () if isinstance(blamed, bool) else tuple(blamed)
        verdict = Verdict.FAIL if blamed else Verdict.PASS
        return cls(name=name, verdict=verdict, found=found, expected=expected, ranks=ranks)

    @classmethod
    def unknown(cls, name: str, why: str) -> "Check":
        """Of what was not measured, or can be held to nothing."""
        return cls(name=name, verdict=Verdict.UNKNOWN, found=why, expected="")


@dataclass(frozen=True, kw_only=True)
class PerRank:
    """A figure of every rank, for the heat map."""

    name: str  # with its unit, 'bf16 products, TFLOP/s'
    values: tuple[float | None, ...]  # by rank; None: not measured
    more_is_better: bool = True


def worst(checks: Iterable[Check]) -> Verdict:
    """FAIL where one failed, PASS where all passed, else UNKNOWN: where there is none too."""
    verdicts = {check.verdict for check in checks}
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    return Verdict.PASS if verdicts == {Verdict.PASS} else Verdict.UNKNOWN
