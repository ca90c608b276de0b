"""What a run is doing, announced once: clock, profiler and watchdog listen.

phases = Phases(watchdog)
with phases("forward and backward", step=12):
    ...
with phases("scores", patient=True):
    for part in parts:
        phases.tick()
"""

from collections.abc import Iterator
from contextlib import contextmanager


class PhaseListener:
    """Hears of each phase in the main thread; what a listener does in it delays the run."""

    def enter(self, name: str, *, step: int | None, patient: bool) -> None:
        """A phase begins, inside the one that is under way, if any."""

    def tick(self) -> None:
        """The phase that was entered last is under way, and moves."""

    def leave(self) -> None:
        """The innermost phase is over, by an exception too."""


class Phases:
    """One rank's. Costs some microseconds a phase; every rank must enter the same ones in the same order."""

    def __init__(self, *listeners: PhaseListener) -> None:
        self._listeners = listeners

    def listen(self, listener: PhaseListener) -> None:
        """Let listener hear of the phases that are entered from here on."""
        self._listeners += (listener,)

    @contextmanager
    def __call__(self, name: str, step: int | None = None, *, patient: bool = False) -> Iterator[None]:
        """Do what name says within it.

        step: the one that is being trained, counted from 1, or was trained last; None: none is. patient: it may
        rightly take long, whatever the time-out of a collective.
        """
        listeners = self._listeners
        for listener in listeners:
            listener.enter(name, step=step, patient=patient)
        try:
            yield
        finally:
            for listener in listeners:
                listener.leave()

    def tick(self) -> None:
        """Say within a phase of many like parts that it moves. Every rank must call as often."""
        for listener in self._listeners:
            listener.tick()
