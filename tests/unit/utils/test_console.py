"""Output that nobody reads, for a while or for ever: what waits is bounded, and what is lost is said."""

import contextlib
import os
import select
import threading

import pytest

from nanogpt.utils import console as lost_terminal
from nanogpt.utils.console import COMMAND, NEVER, Output, OutputLost

LINES = [b"line %d of the log\n" % i for i in range(10_000)]  # three times what a pipe holds


def fill(descriptor):
    """Write until nothing more is taken -> how many bytes were."""
    os.set_blocking(descriptor, False)
    taken = 0
    with contextlib.suppress(OSError):
        while True:
            taken += os.write(descriptor, b"x")
    return taken


@pytest.mark.parametrize("blocks", [True, False])
def test_a_pipe_that_nobody_reads_for_a_while(blocks):
    """Invariant: neither kind of pipe delays a run, and its reader gets every byte in order when it is back."""
    reader, writer = os.pipe()
    os.set_blocking(writer, blocks)
    output = Output(writer, NEVER)
    read = b""
    for half in (LINES[:5000], LINES[5000:]):
        writing = threading.Thread(
            target=lambda lines: [output.write(line) for line in lines], args=[half], daemon=True
        )
        writing.start()
        writing.join(timeout=20)
        assert not writing.is_alive()
        read += os.read(reader, 8192)  # room, but not for all that waits
    taker = threading.Thread(target=output.finish, daemon=True)
    taker.start()
    while len(read) < len(b"".join(LINES)) and select.select([reader], [], [], 20)[0]:
        read += os.read(reader, 65536)
    taker.join(timeout=20)
    assert read == b"".join(LINES)
    os.close(reader), os.close(writer)


def test_what_waits_is_bounded(monkeypatch):
    """Invariant: of what nobody reads the newest KEPT_BYTES are kept, and finish leaves after PATIENCE_S."""
    monkeypatch.setattr(lost_terminal, "KEPT_BYTES", 1000)
    monkeypatch.setattr(lost_terminal, "PATIENCE_S", 0.1)
    reader, writer = os.pipe()
    filled = fill(writer)
    output = Output(writer, NEVER)
    for line in LINES:
        output.write(line)
    assert len(os.read(reader, filled)) == filled
    output.write(b"")
    os.set_blocking(reader, False)
    assert os.read(reader, 65536) == b"".join(LINES)[-1000:]
    fill(writer)
    output.write(b"more")
    output.finish()
    os.close(reader), os.close(writer)


def test_a_command_waits_for_its_reader_but_not_for_ever(monkeypatch):
    """Invariant: a reader that is slower than PATIENCE_S gets all of a pipe that blocks; else it is an error."""
    monkeypatch.setattr(lost_terminal, "PATIENCE_S", 0.1)
    reader, writer = os.pipe()
    filled = fill(writer)
    with pytest.raises(OutputLost, match="cannot be written: nobody reads it"):
        Output(os.dup(writer), COMMAND).write(b"text")
    os.set_blocking(writer, True)
    slow = threading.Timer(0.5, os.read, (reader, filled))
    slow.start()
    Output(writer, COMMAND).write(b"text")
    slow.join()
    assert os.read(reader, 65536) == b"text"
    os.close(reader), os.close(writer)
