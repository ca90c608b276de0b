"""Being asked to stop: by a signal, by a file STOP in the run directory, or by the loss of that directory.

with StopSignals() as stop:         # USR1 and USR2 are remembered from here on
    stop.look_in(out_dir)           # on one rank, to spare a shared disk
    stop.obey()                     # and TERM, INT and HUP, which ended the process before
    if any(world.sum(float(stop.requested))):
        raise StopRequested
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

STOP_FILE = "STOP"
LOST = "the loss of its directory"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ECHO_S = 1.0  # within which a second Ctrl-C is the launcher passing on the first
LOOK_S = 1.0  # between two looks for a file that may be on a shared disk


class StopRequested(Exception):  # noqa: N818, no error
    """Raised on every rank at the same place: the run was asked to stop."""


class StopSignals:
    """Remembers that a signal came. Ctrl-C after it ends the process at once, for who will not wait for the save.

    While there is nothing to save, TERM, INT and HUP do what they did before, so that imports, a large text or a
    compilation of minutes can be ended. USR1 and USR2 are a scheduler's: killed by them a run would count as failed.
    Left as a context manager, it gives every signal back.
    """

    def __init__(self) -> None:
        self.name = ""  # of the first signal, 'SIGTERM'
        self._came_at = 0.0
        self._file: Path | None = None
        self._looked_at = -LOOK_S
        self.is_lost: Callable[[], bool] = lambda: False  # whether the run has lost its directory
        self._before: dict[signal.Signals, Any] = {}  # what each signal did
        self._heed(signal.SIGUSR1, signal.SIGUSR2)

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(self, *exception: object) -> None:
        self._give_back(*self._before)

    def look_in(self, out_dir: Path, is_lost: Callable[[], bool]) -> None:
        """Take the file STOP in this directory for a request, too, and that is_lost() says that it is gone."""
        self._file, self.is_lost = out_dir / STOP_FILE, is_lost

    def obey(self) -> None:
        """From here on a request is obeyed within a step: remember every signal that asks for it."""
        self._heed(*signals_to_heed())

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        if not self.name and self._file and (now := time.monotonic()) - self._looked_at >= LOOK_S:
            self._looked_at = now
            # Not Path.exists, which raises what a network file system may say for a moment, ESTALE or EACCES.
            self.name = f"the file {STOP_FILE}" if os.path.exists(self._file) else LOST if self.is_lost() else ""
        return bool(self.name)

    def _heed(self, *numbers: signal.Signals) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python gives signals to the main thread alone; the file STOP is heeded here, too
        for number in numbers:
            self._before.setdefault(number, signal.signal(number, self._remember))

    def _give_back(self, *numbers: signal.Signals) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            if number in self._before:
                signal.signal(number, self._before[number] or signal.SIG_DFL)  # None: not set by Python

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self._came_at = signal.Signals(number).name, time.monotonic()
            if number != signal.SIGINT:
                self._give_back(signal.SIGINT)  # the kernel ends a process whose main thread is in a long call, too
        elif number == signal.SIGINT and time.monotonic() - self._came_at > ECHO_S:
            self._give_back(signal.SIGINT)
            raise KeyboardInterrupt


def end_at_once_on_interrupt() -> None:
    """Let Ctrl-C end this process as TERM does: Python's KeyboardInterrupt waits for the end of a library's call."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def signals_to_heed() -> list[signal.Signals]:
    """Those that ask this process to stop. A hang-up does not under nohup, which has it ignored."""
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
