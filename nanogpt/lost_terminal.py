"""What is printed where the terminal may go, as an ssh connection does: no line is worth a run.

say("step 10")
"""

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def say(text: str) -> None:
    """A line on stdout, at once."""
    with despite_lost_terminal():
        print(text, flush=True)


@contextmanager
def despite_lost_terminal() -> Iterator[None]:
    """Print within it: where the terminal has gone, with a SIGHUP or without, that goes nowhere and is no error."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        _mute()


def _mute() -> None:
    """Let what is printed go nowhere from now on, where it went to a terminal that has hung up."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed
            descriptor = stream.fileno()
            # A terminal that is gone says no longer that it is one.
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
