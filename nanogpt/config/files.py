"""Files and paths as a person may give them: endless, deaf, locked, in nobody's home.

path = user_path("~/out", "--out_dir=~/out")
with open(path / "metrics.jsonl", "rb", opener=regular) as file: ...
"""

import errno
import fcntl
import glob
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

from nanogpt.config.errors import ConfigError

LARGEST_BYTES = 2**31  # of a file that is read at once: beyond it is a slip
STALE_S = 3600.0  # no file takes so long to write: where there are no locks, an older one is a leftover
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
        raise ConfigError(f"{what}: no such file or directory: {path.split('/')[0]} is no user's home directory here")
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
    """A file to write, which becomes path when all of it is there; where that fails path stays as it was.

    Of several writers at once each has a file of its own, and the last one's becomes path. A writer that is killed
    leaves its file behind, which the next one removes.
    """
    _remove_leftovers(path)
    temporary, file, held = _own_file(path)
    try:
        with file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(held)


def _own_file(path: Path) -> tuple[Path, IO[bytes], int]:
    """A new file beside path -> where it is, the file, a descriptor that holds its lock beyond the file's closing."""
    while True:
        temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
        file = open(temporary, "xb", opener=regular)  # noqa: SIM115, the caller's
        with suppress(BlockingIOError):  # another writer has just taken it for a leftover
            lock(file, 0.0)
            if temporary.exists():
                return temporary, file, os.dup(file.fileno())
        file.close()


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writers of path have left: a writer that lives holds the lock of its file."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError), open(leftover, "r+b", opener=regular) as file:  # another's, locked or gone
            if lock(file, 0.0) or time.time() - os.fstat(file.fileno()).st_mtime > STALE_S:
                leftover.unlink()


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
