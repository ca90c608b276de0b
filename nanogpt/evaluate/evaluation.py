"""What a full pass found, and whether that is what a run is to reach.

Evaluation(loss=0.0964).reaches(config)
"""

from dataclasses import dataclass
from typing import Protocol


class Targets(Protocol):
    """Whatever says what a run is to reach, such as a ResolvedConfig or a Report."""

    @property
    def target_loss(self) -> float: ...
    @property
    def target_recall(self) -> float | None: ...


@dataclass(frozen=True)
class Evaluation:
    """The same on every rank."""

    loss: float  # mean over all judged windows, nats/token
    recall: float | None = None  # share of the judged windows that come back exactly; None: it was not looked for
    by_heart: bool = False  # whether the whole text is recited without a break; looked for where every window is
    cost: float = 1.0  # in full passes of the training's precision
    missed: tuple[int, ...] = ()  # where windows begin that do not come back, if they are few

    def reaches(self, targets: Targets) -> bool:
        """Whether it verifies them."""
        if self.loss > targets.target_loss or targets.target_recall is None:
            return self.loss <= targets.target_loss
        return self.recall is not None and is_recalled(self.recall, self.by_heart, targets.target_recall)


def is_recalled(recall: float, by_heart: bool, target: float) -> bool:
    """Whether a share of the windows, and the whole text or not, are a target_recall: 1 asks for the text besides."""
    return recall >= target and (target < 1 or by_heart)
