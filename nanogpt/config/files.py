"""Files and paths as a person may give them: endless, deaf, locked, in nobody's home.

path = user_path("~/out", "--out_dir=~/out")
with open(path / "metrics.jsonl", "rb", opener=regular) as file: ...
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nanogpt.config.errors import ConfigError

LARGEST_BYTES = 2**31  # of a file that is read at once: beyond it is a slip
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system that does not know them


class IrregularFileError(OSError):
    """A pipe, a terminal, a device: it may be endless, or keep whoever opens it waiting."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(errno.EINVAL, f"{os.path.basename(path)} is not a regular file", os.fspath(path))

    def __str__(self) -> str:
        return str(self.strerror)


def user_path(given: str, what: str) -> Path:
    """given with its ~ expanded; what: how a message calls it. Raises ConfigError where nobody has that home."""
    path = os.path.expanduser(given)
    if path.startswith("~"):
        raise ConfigError(f"{what}: no such file or directory: {path.split('/')[0]} is nobody's home here")
    return Path(path)


def absolute_path(given: str, what: str) -> Path:
    """The same as a path that holds wherever the run goes on. Raises ConfigError where there can be none."""
    try:
        path = os.path.abspath(user_path(given, what))
    except OSError as error:
        raise ConfigError(f"{what}: the working directory is gone ({error.strerror})") from None
    if path.encode(errors="replace").decode() != path:  # the files of a run and its messages could not name it
        raise ConfigError(f"{what} is {path!a} here, which is not UTF-8: start in another directory")
    return Path(path)


def regular(path: str | os.PathLike[str], flags: int) -> int:
    """For open(path, mode, opener=regular). Raises IrregularFileError, at once, for what is no regular file."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that nobody reads, a socket
            raise IrregularFileError(path) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise IrregularFileError(path)


def require_regular(path: Path) -> None:
    """Raise OSError where path, which a library is to open, cannot be read or is no regular file."""
    os.close(regular(path, os.O_RDONLY))


def read_file(path: Path) -> bytes:
    """What path holds. Raises OSError, also where that is no regular file or more than LARGEST_BYTES."""
    with open(path, "rb", opener=regular) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_BYTES:
            raise OSError(errno.EFBIG, f"{path.name} is larger than {LARGEST_BYTES:,} bytes", str(path))
        return file.read()


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes path when all of it is there; where that fails path stays as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=regular) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def lock(file: IO[Any], patience_s: float) -> bool:
    """Hold the lock of an open file until it is closed -> whether there is one: not every file system has locks.

    The kernel lets go of it when the process dies, however it dies. Raises BlockingIOError when another process has had
    it for patience_s.
    """
    give_up = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(0.1)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
