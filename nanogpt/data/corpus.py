"""Where the text comes from: the package, files, directories of them, or a download that is made once.

read_corpus("builtin").text[:14] == "First Citizen:"
read_corpus("texts,more.txt").files                         # {"/home/me/texts/a.txt": its SHA-256, ...}
"""

import hashlib
import os
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import LARGEST_BYTES, IrregularFileError, absolute_path, lock, read_file, regular, user_path


@dataclass(frozen=True)
class Corpus:
    """A text and the SHA-256 of its bytes, which a report names."""

    text: str
    sha256: str
    files: Mapping[str, str]  # SHA-256 of each file that it is read from, by its path in full or its name, in order


@dataclass(frozen=True)
class Download:
    """A file on the web that is known to the byte."""

    url: str
    file_name: str
    size_bytes: int
    sha256: str


TINY_SHAKESPEARE = Download(
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    file_name="tinyshakespeare.txt",
    size_bytes=1_115_394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
ICONV = "convert it with iconv -f {0} -t UTF-8"
# How files begin that are no UTF-8 text, though some are valid UTF-8; what they are, and how to get at their text.
FOREIGN = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", ICONV.format("UTF-32")),  # may begin as UTF-16 does
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", ICONV.format("UTF-16")),
    (rb"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (rb"BZh[1-9]1AY&SY", "compressed by bzip2", "unpack it with bunzip2"),
    (rb"\xfd7zXZ\0", "compressed by xz", "unpack it with unxz"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
    (rb"PK\x03\x04", "a zip archive, as .docx, .odt and .epub are", "unpack it, or save it as plain text"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and name a text file of it"),
    (rb".{257}ustar", "a tar archive", "unpack it, and name a text file of it"),
    (rb"%PDF-[0-9]", "a PDF document", "get its text with pdftotext"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of an old Word or Excel", "save it as plain text"),
)
NAMED = ("builtin", "tinyshakespeare")  # what --data takes besides paths
READ_TIMEOUT_S = 20.0  # without a byte from the server
TOTAL_TIMEOUT_S = 300.0  # for the whole download, and for waiting while another process makes it


def read_corpus(data: str) -> Corpus:
    """The text that --data names, whose files follow one another as `cat` prints them: nothing is put between.

    data: 'builtin', 'tinyshakespeare', a file, a directory, or several of these with commas. Raises ConfigError, which
    names the file, where there is no text.
    """
    texts, hashes, joined, size_bytes = [], {}, hashlib.sha256(), 0
    for name in _files(data):
        content = _read(name, data)
        size_bytes += len(content)
        if size_bytes > LARGEST_BYTES:
            raise ConfigError(f"--data={data} is larger than {LARGEST_BYTES:,} bytes: with {name}, {size_bytes:,}")
        texts.append(_decoded(name, content))
        joined.update(content)
        path = name if name in NAMED else os.path.abspath(user_path(name, f"--data={name}"))
        hashes[path] = hashlib.sha256(content).hexdigest()
    return Corpus("".join(texts), joined.hexdigest(), hashes)


def absolute_data(data: str) -> str:
    """data with its paths in full, which hold wherever the run goes on. Raises ConfigError where there can be none."""
    parts = [part if part in NAMED else str(absolute_path(part, f"--data={part}")) for part in _parts(data)]
    for part in parts:
        if "," in part and len(parts) > 1:  # of the directory that we are in: the parts could not be told apart again
            raise ConfigError(f"--data={data}: {part} has a comma in its path: name one file or directory alone")
    return ",".join(parts)


def differing_files(stated: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Which of a text's files another reading finds changed, or has alone; none where nothing is stated."""
    return [path for path in {**stated, **found} if stated and stated.get(path) != found.get(path)]


def _parts(data: str) -> list[str]:
    """What --data names, one by one: a path that is there is one, whatever commas it has. Raises ConfigError."""
    parts = data.split(",")
    if _is_there(data) or len(parts) == 1:
        return [data]
    if "" in parts:
        raise ConfigError(f"--data={data} names nothing beside a comma: write PATH,PATH")
    in_full = all(part in NAMED or os.path.isabs(part) for part in parts)  # as a run stores them
    return parts if in_full or any(map(_is_there, parts)) else [data]  # which may be the one path of a run, now gone


def _is_there(part: str) -> bool:
    return part in NAMED or os.path.lexists(user_path(part, f"--data={part}"))


def _files(data: str) -> list[str]:
    """The files that --data names, in the order in which they are read. Raises ConfigError."""
    names = []
    for part in _parts(data):
        is_directory = part not in NAMED and os.path.isdir(user_path(part, f"--data={part}"))
        names += _in_directory(part) if is_directory else [part]
    if len(names) == 1:
        return names
    first: dict[str, str] = {}
    for name in names:
        with _refused(name, data):
            real = name if name in NAMED else os.path.realpath(user_path(name, f"--data={name}"))
        if real in first:
            raise ConfigError(f"--data={data} has one file twice, as {first[real]} and {name}: name it once")
        first[real] = name
    return names


def _in_directory(part: str) -> list[str]:
    """The files that a shell means by part/*.txt, but for directories, in the order of their names' bytes."""
    path = user_path(part, f"--data={part}")
    with _refused(part, part):
        # Of strings in UTF-8 that is the order of their characters' numbers, and no locale's.
        names = sorted(name for name in os.listdir(path) if name.endswith(".txt") and not name.startswith("."))
    for name in names:
        if name.encode(errors="replace").decode() != name:  # the files of a run and its messages could not name it
            raise ConfigError(f"--data={part}: the name of {name!a} in it is not UTF-8: rename it")
    names = [name for name in names if not os.path.isdir(path / name)]
    if not names:
        raise ConfigError(f"--data={part}: no file *.txt in this directory (directories in it are not searched)")
    return [os.path.join(part, name) for name in names]


def _read(name: str, data: str) -> bytes:
    """What a file that --data names holds. Raises ConfigError."""
    if name == "builtin":
        return (files("nanogpt") / "assets" / "coriolanus.txt").read_bytes()
    if name == "tinyshakespeare":
        return fetch(TINY_SHAKESPEARE, cache_dir()).read_bytes()
    with _refused(name, data):
        return read_file(user_path(name, f"--data={name}"))


@contextmanager
def _refused(name: str, data: str) -> Iterator[None]:
    """Read a file or directory that --data names within it. Raises ConfigError where that cannot be."""
    try:
        yield
    except ConfigError:
        raise
    except FileNotFoundError:
        hint = "a comma separates paths" if "," in data else "builtin and tinyshakespeare need none"
        hint = "a link that leads nowhere" if os.path.islink(user_path(name, f"--data={name}")) else hint
        raise ConfigError(f"--data={name}: no such file ({hint})") from None
    except IrregularFileError:
        raise ConfigError(f"--data={name} is not a regular file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ConfigError(f"--data={name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decoded(name: str, content: bytes) -> str:
    """The text in a file that --data names. Raises ConfigError where there is none."""
    if foreign := _foreign(content):
        raise ConfigError(f"--data={name} is {foreign[0]}, and not UTF-8 text: {foreign[1]}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = "it is not text" if 0 in content else f"{ICONV.format('ENCODING')}; `file -i` may know the ENCODING"
        where = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise ConfigError(f"--data={name} is not UTF-8 text ({where}): {remedy}") from None
    if not text.strip():
        raise ConfigError(f"--data={name} is empty: name a file with text in it")
    return text


def _foreign(content: bytes) -> tuple[str, str] | None:
    """What a file is that is no UTF-8 text, and how to get at its text; None where it is not known to be another."""
    for beginning, what, remedy in FOREIGN:
        if re.match(beginning, content, re.DOTALL):
            return what, remedy
    head = content[: 1 << 16]
    share = head.count(0) / max(1, len(head))
    if share > 0.8:
        return "NUL bytes", "it is not text"
    if share > 0.3:  # without a mark at its beginning, ASCII in UTF-16 is valid UTF-8, every second character a NUL
        width = 4 if share > 0.6 else 2
        order = "LE" if head[::width].count(0) < head[width - 1 :: width].count(0) else "BE"
        return f"UTF-{8 * width} text", ICONV.format(f"UTF-{8 * width}{order}")
    return None


def cache_dir() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/nanogpt-overfit, or ~/.cache/nanogpt-overfit."""
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME, or ~/.cache") / "nanogpt-overfit"


def fetch(download: Download, directory: Path) -> Path:
    """The downloaded file in directory: fetched once, by one process of this machine, resumed where it broke off.

    It gets its final name only when its size and SHA-256 are right. Raises ConfigError when it cannot be had.
    """
    target = directory / download.file_name
    instead = "use --data=builtin, or --data=PATH with a copy of your own"
    try:
        if _is_intact(target, download):
            return target
        directory.mkdir(parents=True, exist_ok=True)
        with (
            open(directory / f"{download.file_name}.lock", "w", opener=regular) as file,
            TemporaryDirectory(dir=directory) as mine,
        ):
            locked = lock(file, TOTAL_TIMEOUT_S)  # else each process downloads it for itself
            if _is_intact(target, download):  # another rank was first
                return target
            part = Path(directory if locked else mine, f"{download.file_name}.part")
            _download(download, part)
            if not _is_intact(part, download):
                part.unlink()
                raise ConfigError(f"{download.url} did not send the expected file (SHA-256 differs): {instead}")
            os.replace(part, target)
    except (OSError, HTTPException) as error:  # URLError, time-outs and a full or read-only disk are OSErrors
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot download {download.file_name} ({reason}): {instead}") from None
    return target


def _is_intact(path: Path, download: Download) -> bool:
    try:
        content = read_file(path)
    except FileNotFoundError:
        return False
    return len(content) == download.size_bytes and hashlib.sha256(content).hexdigest() == download.sha256


def _download(download: Download, part: Path) -> None:
    """Append to part what it still lacks. A server that ignores the range sends all of it again."""
    have = part.stat().st_size if part.exists() else 0
    if have >= download.size_bytes:
        part.unlink()  # as long as the file and yet not it
        have = 0
    request = urllib.request.Request(download.url, headers={"Range": f"bytes={have}-"} if have else {})
    give_up = time.monotonic() + TOTAL_TIMEOUT_S
    with (
        urllib.request.urlopen(request, timeout=READ_TIMEOUT_S) as response,
        open(part, "ab" if response.status == 206 else "wb", opener=regular) as file,
    ):
        while file.tell() <= download.size_bytes and (chunk := response.read(1 << 16)):
            file.write(chunk)
            if time.monotonic() > give_up:
                raise TimeoutError(f"not finished after {TOTAL_TIMEOUT_S:.0f} s; run again to go on")
        if response.length and file.tell() <= download.size_bytes:  # read() ends quietly when a connection breaks off
            raise ConnectionError("the connection broke off; run again to go on")
