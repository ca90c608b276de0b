"""When is a full pass worth its cost?

    schedule = EvalSchedule(target_loss=0.099, windows=130, batch_size=16, averages_below=0.396, ripe_steps=47)
    schedule.observe(step_loss)         # every step
    if schedule.averaging:
        average.update()
    if schedule.due():                  # the same answer on every rank
        schedule.judged(full_pass(...))

Only a full pass may end a run; training losses, which lag and are noisy, only say when to make one. A pass judges an
average of the weights, and waits until that is ripe: a young one is mostly its first weights.
"""

from math import ceil

WORTHWHILE = 1.7  # first pass when the running estimate is within this factor of the target
BUDGET = 0.08  # of the training steps, in passes; under the 10 % that passes may take, since their cost is an estimate
EARLY, EARLY_BUDGET = 2, 0.25  # the first passes: in a short run waiting for the budget costs more than they do
FORWARD_SHARE = 0.4  # a forward pass costs about a third of a step, with a margin
OVERDUE = 4.0  # rests without a pass near the target, after which one is made anyway
HOVERS = 2.5  # a loss that stays within this factor of the target for as long as earns a pass is judged, too
LEAST = 0.05  # of a pass, what any look costs: the average's way into the model and back
MEMORY = 0.8  # of the running estimate in the next one: the last five steps or so


class EvalSchedule:
    """Counts costs in training steps, not seconds, so that every rank decides alike without being asked."""

    def __init__(
        self,
        target_loss: float,
        windows: int,
        batch_size: int,
        *,
        averages_below: float = 0.0,
        ripe_steps: float = 0.0,
    ) -> None:
        """windows: how many one full pass reads.

        averages_below: the estimate, nats/token, from which on weights are averaged. ripe_steps: for how many steps'
        weights a pass waits.
        """
        self.target_loss = target_loss
        self.averages_below = averages_below
        self.ripe_steps = ripe_steps
        self._averaged = 0  # steps whose weights are in the average
        self.cost_steps = FORWARD_SHARE * windows / batch_size
        self._steps = 0
        self._sum, self._weight = 0.0, 0.0  # of the losses seen, each weighing MEMORY times the next
        self._passes = 0.0  # in what one costs that gives a loss alone
        self._last_step = 0  # of a pass
        self._last_look = 0  # of a look in its place
        self._far_step = 0  # the newest at which the estimate was far off
        self._ratio = 1 / WORTHWHILE  # of the newest full pass to the estimate when it was made

    def state_dict(self) -> dict[str, float]:
        """All that it has counted, as JSON."""
        return {name: value for name, value in vars(self).items() if name.startswith("_")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from state_dict()."""
        vars(self).update(state)

    @property
    def estimate(self) -> float:
        """Mean loss of the last few steps, nats/token; infinite before the first."""
        return self._sum / self._weight if self._steps else float("inf")

    @property
    def averaging(self) -> bool:
        """Whether the weights of now go into an average; once begun, it goes on."""
        return self._averaged > 0

    @property
    def possible(self) -> bool:
        """Whether a pass made now is within the budget, and would judge a ripe average."""
        return self._steps >= self._allowed_at and not self._unripe_steps

    @property
    def unjudged_steps(self) -> int:
        """Steps since a pass was last made, or could have been and was not thought worth it."""
        return 0 if self.possible else self._steps - self._last_step

    @property
    def wait_steps(self) -> int:
        """Steps until the next pass can be made, if the losses call for it; at least 1."""
        return max(1, ceil(self._allowed_at) - self._steps, self._unripe_steps)

    @property
    def _unripe_steps(self) -> int:
        """Steps until the average is ripe, at the soonest."""
        return max(0, ceil(self.ripe_steps) - self._averaged)

    @property
    def _allowed_at(self) -> float:
        """The step from which one more pass is within the budget, and its own cost after the last pass or look."""
        if self._passes < EARLY:
            affordable_at = (self._passes + 1) * self.cost_steps / EARLY_BUDGET
        else:
            affordable_at = (self._passes + 1 - EARLY) * self.cost_steps / BUDGET
        return max(affordable_at, max(self._last_step, self._last_look) + self.cost_steps)

    def observe(self, loss: float) -> None:
        """The mean loss of a step's global batch, finite."""
        self._steps += 1
        self._sum = MEMORY * self._sum + loss
        self._weight = MEMORY * self._weight + 1
        if self.estimate > HOVERS * self.target_loss:
            self._far_step = self._steps
        if self.averaging or self.estimate < self.averages_below:
            self._averaged += 1

    def due(self) -> bool:
        """Whether a pass made now is likely to verify the target and is within the budget."""
        # The budget has grown while the loss was far off; spent at once it would be gone before the target is near.
        if not self.possible:
            return False
        if self.estimate * self._ratio <= self.target_loss:
            return True
        rested = self._steps - self._last_step
        # The ratio was one noisy moment's: near the target look again now and then, whatever it foretells.
        if rested >= OVERDUE * self.cost_steps and self.estimate <= WORTHWHILE * self.target_loss:
            return True
        # At a hot rate the training loss may never come nearer, while the averaged weights are there.
        return min(rested, self._steps - self._far_step) >= self.cost_steps / BUDGET

    def settle(self) -> None:
        """The run goes on to another target: from here on it can make EARLY passes at once."""
        self._passes = min(self._passes, BUDGET * self._steps / self.cost_steps)

    def judged(self, loss: float, *, passes: float = 1) -> None:
        """The loss that a full pass gave at this step; passes: what it cost, in those that give a loss alone."""
        self._passes += passes
        self._last_step = self._steps
        self._ratio = min(1.0, loss / self.estimate)

    def looked(self, passes: float) -> None:
        """A look at a share of the windows has shown that a pass which was due would find nothing."""
        self._passes += max(passes, LEAST)
        self._last_look = self._steps
