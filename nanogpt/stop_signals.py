"""Being asked to stop: by a signal, or by a file STOP in the run directory.

stop = StopSignals()            # early: a signal during the imports must not be lost
stop.look_in(out_dir)           # on one rank, to spare a shared disk
if any(world.sum(float(stop.requested))):
    raise StopRequested
"""

import signal
import time
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ECHO_S = 1.0  # within which a second Ctrl-C is the launcher passing on the first


class StopRequested(Exception):  # noqa: N818, no error
    """Raised on every rank at the same place: the run was asked to stop."""


class StopSignals:
    """Remembers that a signal came. A second Ctrl-C raises KeyboardInterrupt, for who will not wait for the save."""

    def __init__(self) -> None:
        self.name = ""  # of the first signal, 'SIGTERM'
        self._came_at = 0.0
        self._file: Path | None = None
        for number in signals_to_heed():
            signal.signal(number, self._remember)

    def look_in(self, out_dir: Path) -> None:
        """Take the file STOP in this directory for a request, too."""
        self._file = out_dir / STOP_FILE

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        if not self.name and self._file and self._file.exists():
            self.name = f"the file {STOP_FILE}"
        return bool(self.name)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT" and time.monotonic() - self._came_at > ECHO_S:
            raise KeyboardInterrupt
        if not self.name:
            self.name, self._came_at = signal.Signals(number).name, time.monotonic()


def signals_to_heed() -> list[signal.Signals]:
    """Those that ask this process to stop. A hang-up does not under nohup, which has it ignored."""
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
