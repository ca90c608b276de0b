"""Where the text comes from: the package, files of all kinds, a real HTTP server on this machine."""

import bz2
import errno
import fcntl
import gzip
import hashlib
import http.server
import io
import lzma
import re
import subprocess
import tarfile
import threading
import zipfile
from multiprocessing import get_context

import pytest

from nanogpt.config.errors import ConfigError
from nanogpt.data import corpus
from nanogpt.data.corpus import Download, fetch, read_corpus
from nanogpt.data.tokenizer import encode

CONTENT = b"To be, or not to be: that is the question.\n" * 5000


def test_the_excerpt():
    """Reference: Coriolanus 1.1 opens it, 3.3 is in it, and it has at least 16,384 tokens."""
    text = read_corpus("builtin").text
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")
    assert "Have you a catalogue\nOf all the voices that we have procured" in text
    assert "Let us kill him, and we'll have corn at our own price." in text
    assert len(encode(text)) >= 16_384


def test_the_excerpt_begins_as_the_corpus_does(tiny_shakespeare):
    """Reference: Tiny Shakespeare, whose first scene this is; runs on either memorise the same default subset."""
    assert read_corpus("builtin").text[:10_000] == tiny_shakespeare.read_text()[:10_000]


@pytest.mark.parametrize("content", ["naïve café\r\n", "\ufeffwith a mark", "tab\tand\x00nul"])
def test_a_file_is_read_as_it_is(tmp_path, content):
    """Invariant: no newline, mark or control character is changed, and the hash is that of the bytes."""
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode())
    read = read_corpus(str(path))
    assert read.text == content
    assert read.sha256 == hashlib.sha256(content.encode()).hexdigest()


TEXT = "First Citizen:\nBefore we proceed any further, hear me speak: naïve café.\n" * 20


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("text.txt", TEXT)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("text.txt"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(TEXT.encode()), "is compressed by gzip, and not UTF-8 text: unpack it with gunzip"),
        (bz2.compress(TEXT.encode()), "bunzip2"),
        (lzma.compress(TEXT.encode()), "unxz"),
        (zipped(), "is a zip archive"),
        (tarred(), "is a tar archive"),
        (b"%PDF-1.4\n(some text)\n%%EOF\n", "is a PDF document.*pdftotext"),
        (TEXT.encode("utf-16"), "is UTF-16 text, .* convert it with iconv -f UTF-16 -t UTF-8$"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "is UTF-16 text, .* iconv -f UTF-16 -t UTF-8$"),
        (TEXT.encode("utf-32"), "is UTF-32 text, .* iconv -f UTF-32 -t UTF-8$"),
        (TEXT.encode("utf-16-le"), "is UTF-16 text, .* iconv -f UTF-16LE -t UTF-8$"),
        (TEXT.encode("utf-16-be"), "is UTF-16 text, .* iconv -f UTF-16BE -t UTF-8$"),
        (TEXT.replace("ï", "i").encode("utf-16-le", "ignore"), "iconv -f UTF-16LE -t UTF-8$"),
        (TEXT.encode("utf-32-le"), "is UTF-32 text, .* iconv -f UTF-32LE -t UTF-8$"),
        (TEXT.encode("utf-32-be"), "is UTF-32 text, .* iconv -f UTF-32BE -t UTF-8$"),
        (bytes(5000), "is NUL bytes"),
        (
            TEXT.encode("latin1"),
            r"is not UTF-8 text \(byte 0xef at offset 63\): convert it with iconv -f ENCODING",
        ),
        (TEXT.encode("utf-8") + b"\xff\x00", "it is not text$"),
    ],
)
def test_what_is_no_text_is_named_for_what_it_is(tmp_path, content, message):
    """Reference: files of Python's own packers and encoders; where iconv is advised, its answer is the text."""
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_corpus(str(path))
    if advised := re.search(r"iconv -f \S+ -t \S+$", str(raised.value)):
        converted = subprocess.run([*advised[0].split(), path], capture_output=True, check=True).stdout
        (tmp_path / "converted").write_bytes(converted)
        assert read_corpus(str(tmp_path / "converted")).text.replace("naive", "naïve") == TEXT


class Server:
    """A file server that can break off, ignore ranges, or send something else."""

    def __init__(self, content=CONTENT, *, stop_after=None, ranges=True):
        self.requests, self.content, self.stop_after = [], content, stop_after
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.headers.get("Range"))
                found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
                start = int(found[1]) if found and ranges else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                self.wfile.write(outer.content[start:][: outer.stop_after])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.download = Download(
            url=f"http://127.0.0.1:{self.http.server_port}/text", file_name="text.txt",
            size_bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest(),
        )  # fmt: skip


@pytest.fixture
def serve():
    servers = []

    def start(*args, **options):
        servers.append(Server(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def test_it_is_fetched_once(serve, tmp_path):
    """Invariant: the second call asks the server nothing."""
    server = serve()
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_resumed(serve, tmp_path, ranges):
    """Invariant: what came before the break is kept; the final name appears only with the whole file."""
    server = serve(stop_after=50_000, ranges=ranges)
    with pytest.raises(ConfigError, match="cannot download"):
        fetch(server.download, tmp_path)
    assert not (tmp_path / "text.txt").exists()
    assert (tmp_path / "text.txt.part").stat().st_size == 50_000
    server.stop_after = None
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=50000-"]


@pytest.mark.parametrize("wrong", [CONTENT[:-1] + b"X", CONTENT + b"more", b"<html>log in first</html>"])
def test_another_file_is_refused(serve, tmp_path, wrong):
    """Invariant: a file of another size or hash never gets the final name, and does not spoil the next try."""
    server = serve(wrong)
    with pytest.raises(ConfigError, match="--data=builtin"):
        fetch(server.download, tmp_path)
    assert not (tmp_path / "text.txt").exists()
    server.content = CONTENT
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT


def test_a_damaged_cached_file_is_fetched_again(serve, tmp_path):
    """Invariant: the cache is checked each time."""
    server = serve()
    (tmp_path / "text.txt").write_bytes(CONTENT[:-5] + b"XXXXX")
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT


def test_a_silent_server_is_given_up(serve, tmp_path, monkeypatch):
    """Invariant: a server that accepts and says nothing ends in one line, not in a hang."""
    import socket

    monkeypatch.setattr(corpus, "READ_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(ConfigError, match="timed out"):
            fetch(Download(url, "text.txt", 10, "0" * 64), tmp_path)


def _fetch(download, directory, answers):
    answers.put(fetch(download, directory).read_bytes() == CONTENT)


def test_many_processes_one_download(serve, tmp_path):
    """Invariant: processes that start together all get the file, and the server is asked once."""
    server, context = serve(), get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=_fetch, args=(server.download, tmp_path, answers), daemon=True) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert [answers.get(timeout=60) for _ in ranks] == [True] * 4
    for rank in ranks:
        rank.join(timeout=60)
    assert server.requests == [None]


def test_a_cache_without_locks(serve, tmp_path, monkeypatch):
    """Invariant: where the file system has no locks the text comes all the same, and nothing but it stays."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert fetch(serve().download, tmp_path).read_bytes() == CONTENT
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "text.txt.lock"}


def test_an_unwritable_cache(serve, tmp_path):
    """Invariant: a cache directory that cannot be made is one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot download"):
        fetch(serve().download, tmp_path / "file")
