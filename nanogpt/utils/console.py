"""What is printed, where it may not be shown or written: a full disk, a lost terminal, a closed descriptor.

with standard_streams():    # around all of a program
    outlive_output()        # a run: what cannot be written waits from here on, and ends nothing
    say("step 10")
"""

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import RLock, current_thread, main_thread
from typing import TYPE_CHECKING, BinaryIO, TextIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

KEPT_BYTES = 2**20  # of what waits to be written, the newest
PATIENCE_S = 10.0  # with a reader who takes nothing

# Which errors of writing end the process. A run goes on without its reader: Ctrl-C also ends the tee behind it, and the
# save that it asks for would be lost.
COMMAND, NEVER = (OSError,), ()


class OutputLost(Exception):  # noqa: N818, as StopRequested
    """Standard output cannot be written; the message is one line. It is raised once, and then all goes nowhere."""


class ReaderLeft(OutputLost):
    """The same because whoever read it has left, as `| head` does with all that it wants: no error."""


class Output(io.RawIOBase):
    """The bytes of a standard stream. What is not taken waits, and is written before what follows it."""

    def __init__(self, descriptor: int, fatal: tuple[type[OSError], ...]) -> None:
        """fatal: the errors that raise OutputLost, in the main thread."""
        self.fatal = fatal
        self._descriptor = descriptor
        self._waiting = bytearray()
        self._lock = RLock()  # a finalizer may print in the middle of it

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: "ReadableBuffer") -> int:
        """Take data, and write it if it can be: a run never waits for its reader, a command does as long as others."""
        with self._lock:
            self._waiting += data
            try:
                self._write_waiting(0.0 if self.fatal != COMMAND else self._patience_s())
            except OSError as error:
                # A reader may leave with all that there is to read: unbuffered, print writes the end of a line apart.
                is_lost = bool(self._waiting.strip())
                if is_lost and isinstance(error, self.fatal) and current_thread() is main_thread():
                    self.let_go()
                    raise _lost(error) from None
                del self._waiting[:-KEPT_BYTES]
        return memoryview(data).nbytes

    def finish(self) -> None:
        """Write what waits, if somebody still takes it, and let go of the rest."""
        with self._lock:
            try:
                self._write_waiting(PATIENCE_S)
            except OSError:
                self.let_go()

    def let_go(self) -> None:
        """Let everything go nowhere from now on: Python, too, would try again at its end and fail."""
        self._waiting.clear()
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._descriptor)

    def _patience_s(self) -> float | None:
        """How long a command waits for a reader: in a pipe that blocks, as `| less`, for ever."""
        return None if os.get_blocking(self._descriptor) else PATIENCE_S

    def _write_waiting(self, patience_s: float | None) -> None:
        while self._waiting:
            if not select.select([], [self._descriptor], [], patience_s)[1]:
                raise BlockingIOError(errno.EAGAIN, "nobody reads it")
            # A pipe that has room has room for this much: it does not block.
            written = os.write(self._descriptor, self._waiting[: select.PIPE_BUF])
            del self._waiting[:written]


@contextmanager
def standard_streams() -> Iterator[None]:
    """Three standard streams, whatever was closed, of which the two for output take every character.

    They are to stay until the process ends. Raises OutputLost, within, where a command's output cannot be written.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would become it, and hold what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    outputs = (Output(1, COMMAND), Output(2, NEVER))
    sys.stdout, sys.stderr = _stream(sys.stdout, outputs[0]), _stream(sys.stderr, outputs[1])
    streams = (sys.stdout, sys.stderr)
    try:
        yield
    finally:
        for stream, output in zip(streams, outputs, strict=True):
            output.fatal = NEVER
            stream.flush()
            output.finish()


def outlive_output() -> None:
    """From here on standard output is not worth this process."""
    if isinstance(output := getattr(sys.stdout, "buffer", None), Output):  # it is another one in a notebook
        output.fatal = NEVER


def say(text: str) -> None:
    """A line on stdout, at once."""
    print(text, flush=True)


def wants_colour(stream: TextIO) -> bool:
    """Whether stream is a terminal that has colours, and whose user has not declined them (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and (os.environ.get("TERM") or "dumb") != "dumb"


def _stream(before: TextIO | None, output: Output) -> TextIO:
    """A text stream as the one before; None: it was closed when Python began."""
    raw = cast(BinaryIO, output)  # all that is asked of it is to write
    if before is None:
        return io.TextIOWrapper(raw, encoding="utf-8", errors="replace", line_buffering=True)
    assert isinstance(before, io.TextIOWrapper)
    with suppress(OSError):
        before.flush()
    errors = "replace" if before.errors in ("strict", "surrogateescape") else before.errors
    return io.TextIOWrapper(
        raw, encoding=before.encoding, errors=errors, line_buffering=before.line_buffering,
        write_through=before.write_through,
    )  # fmt: skip


def _lost(error: OSError) -> OutputLost:
    if isinstance(error, BrokenPipeError):
        return ReaderLeft("nobody reads the output any more")
    return OutputLost(f"the output cannot be written: {error.strerror}")
