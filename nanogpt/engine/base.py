"""What the training loop knows of an engine, and all it knows."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from nanogpt.model import GPT


@dataclass(frozen=True)
class Batch:
    """Rows of one step that one rank holds at once."""

    idx: Tensor  # (rows, T)
    targets: Tensor  # (rows, T)
    step_tokens: int  # targets in the whole global batch that these rows belong to


class Engine(ABC):
    """One rank's model, optimizer and gradients.

    A step is one or more forward_backward, the last of them with is_last, and then step.
    """

    name: str
    model: GPT  # never the wrapper: full passes, recitation and saving go through this
    compiled: bool  # whether the training forward is a compiled one
    compile_s: float  # what compiling cost, seconds

    @abstractmethod
    def forward_backward(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Add the batch's gradient to the step's -> the batch's loss sum in nats, (), detached, on the device.

        The gradient is that of the mean loss over the global batch: each rank divides by step_tokens, whatever its own
        share of the rows. A non-finite loss makes the whole gradient non-finite, so that every rank refuses the step.
        """

    @abstractmethod
    def step(self, lr: float) -> float:
        """Update the weights at learning rate lr, clear the gradient -> its L2 norm over all parameters and ranks.

        With a non-finite norm nothing is updated. Waits for the device.
        """
