"""Checkpoints that any engine on any number of ranks can write and read.

    writer = CheckpointWriter(out_dir, world, keep=3)
    writer.begin(step, pieces, progress)      # copies, and writes in the background
    writer.commit()                           # once every rank's thread is done: complete from here on

    checkpoint, skipped = newest_intact(out_dir)
    checkpoint.read("weight/transformer.wte.weight", 0, 768)

A piece is a flat stretch of a named tensor, so what one engine wrote in any cut another reads in its own. The files are
safetensors and JSON: reading executes no code. A checkpoint is a directory that gets its name only when all of it,
manifest last, is on the disk.
"""

import hashlib
import json
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import read_file, whole
from nanogpt.distributed.snapshot import snapshot
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import finite, parse_json, write_json
from nanogpt.storage.tensor_file import file_sha256, save_tensors


class CheckpointError(Exception):
    """A checkpoint is not whole; the message says of it what is wrong, as 'manifest.json is damaged'."""


CHECKPOINTS, LATEST, MANIFEST = "checkpoints", "latest", "manifest.json"
FORMAT = 3  # raised with every change of what a checkpoint holds


@dataclass(frozen=True)
class Piece:
    """Values [start, start + len(values)) of the flattened tensor called name."""

    name: str
    start: int
    values: Tensor  # (n,), fp32, any device


@dataclass(frozen=True)
class _Written:
    """What came of one rank's file."""

    failure: str = ""  # '': it is on the disk
    name: str = ""
    bytes: int = 0
    sha256: str = ""


class CheckpointWriter:
    """One rank's part in writing checkpoints: never two at once, and none that stops the run."""

    def __init__(self, out_dir: Path, world: World, *, keep: int, attempt: str = "", on_device: bool = False) -> None:
        """attempt: a name that no other process has which may still be writing a checkpoint of the same run.

        on_device: the device has room for a copy of this rank's pieces.
        """
        self._directory, self._world, self._keep, self._on_device = out_dir / CHECKPOINTS, world, keep, on_device
        self._suffix = f"{attempt and '.'}{attempt}.tmp"
        for abandoned in self._directory.glob(".step_*.tmp"):  # of a kill, on this rank's disk
            shutil.rmtree(abandoned, ignore_errors=True)
        self._thread: Thread | None = None
        self._result = _Written()
        self._step = 0
        self._progress: dict[str, Any] = {}

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def begun(self) -> bool:
        """Whether a checkpoint waits for its commit; the same on every rank."""
        return self._thread is not None

    def begin(self, step: int, pieces: Iterable[Piece], progress: dict[str, Any]) -> None:
        """Copy the pieces, which takes the time of a copy, and write the copy in the background.

        progress: what else the run needs to go on, as JSON; the first rank's counts. Copied too: the run counts on.
        """
        assert not self.begun
        on_host = snapshot({f"{p.name}@{p.start}": p.values for p in pieces}, on_device=self._on_device)
        self._step, self._progress, self._result = step, finite(progress), _Written("its writer ended early")
        self._thread = Thread(target=self._write, args=(on_host,), daemon=True)
        self._thread.start()

    def commit(self) -> str:
        """Wait for this rank's thread, and make the checkpoint complete -> '' or what failed. Every rank must call."""
        assert self._thread is not None, "a checkpoint has been begun"
        self._thread.join()
        self._thread = None
        results = self._world.gather(self._result)
        failure = next((r.failure for r in results if r.failure), "")
        if self._world.is_first and not failure:
            try:
                self._complete(results)
            except OSError as error:
                failure = str(error)
        if failure := self._world.gather(failure)[0]:
            shutil.rmtree(self._temporary, ignore_errors=True)  # each rank its own, where they share no disk
            self._world.gather(None)  # before one of them writes there again, where they do
        return failure

    @property
    def _temporary(self) -> Path:
        return self._directory / f".step_{self._step:08d}{self._suffix}"

    def _write(self, on_host: Callable[[], dict[str, Tensor]]) -> None:
        """In the thread: this rank's file, onto the disk."""
        name = f"rank_{self._world.rank:05d}.safetensors"
        path = self._temporary / name
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            save_tensors(on_host(), path)
            _sync(path)
            self._result = _Written(name=name, bytes=path.stat().st_size, sha256=file_sha256(path))
        except Exception as error:  # a full disk, above all; nothing that happens here may end the run
            self._result = _Written(str(error) or type(error).__name__)

    def _complete(self, ranks: Sequence[_Written]) -> None:
        for written in ranks:
            path = self._temporary / written.name
            if not path.exists() or path.stat().st_size != written.bytes:
                raise OSError(f"rank 0 does not see {path} of another rank: all nodes need one shared file system")
        files = {written.name: {"bytes": written.bytes, "sha256": written.sha256} for written in ranks}
        content = {"format": FORMAT, "step": self._step, "files": files, "progress": self._progress}
        write_json(self._temporary / MANIFEST, content | {"sha256": _digest(content)})
        _sync(self._temporary / MANIFEST)
        _sync(self._temporary)
        final = self._directory / f"step_{self._step:08d}"
        old = self._directory / f".{final.name}.old"
        if final.exists():  # a run that came back to this step
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(self._temporary, final)
        shutil.rmtree(old, ignore_errors=True)
        _name_latest(self._directory, final.name)
        for _, old in _newest_first(self._directory)[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)


def abandon_after(out_dir: Path, step: int) -> list[str]:
    """Set the checkpoints of later steps aside, as a run goes on from this one -> their names.

    They are broken or of a course that the run leaves; "newest" would still mean them.
    """
    directory = out_dir / CHECKPOINTS
    found, this = _newest_first(directory), f"step_{step:08d}"
    later = [(name, path) for name, path in found if name > this]
    if not later:
        return []
    (directory / LATEST).unlink(missing_ok=True)  # first of all: it must not name what is gone
    for name, path in later:
        aside = directory / f"abandoned_{name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    left = next((name for name, path in found if name <= this and path.name == name), None)
    if left:
        with suppress(OSError):  # a full disk; the next save names itself
            _name_latest(directory, left)
    return [name for name, _ in later]


class CheckpointReader:
    """A complete checkpoint, for reading."""

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """Raises CheckpointError when any of it is missing, damaged, or of another version.

        verify: read every byte and compare; not needed where another rank has.
        """
        self.path = path
        try:
            content = parse_json(read_file(path / MANIFEST))
            digest = content.pop("sha256")
            if content["format"] != FORMAT:
                raise CheckpointError(f"is of format {content['format']}, this program's is {FORMAT}")
            if digest != _digest(content):
                raise CheckpointError(f"{MANIFEST} is damaged")
            for name, facts in content["files"].items() if verify else ():
                if (path / name).stat().st_size != facts["bytes"] or file_sha256(path / name) != facts["sha256"]:
                    raise CheckpointError(f"{name} is damaged")
            self.step: int = content["step"]
            self.progress: dict[str, Any] = content["progress"]
            self._files = [safe_open(path / name, framework="pt") for name in content["files"]]
        except FileNotFoundError as error:
            raise CheckpointError(f"has no {Path(error.filename).name}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"cannot be read: {error or type(error).__name__}") from None
        self._index: dict[str, list[tuple[int, int, str]]] = {}  # name -> [(start, file, key)], ascending
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118, it is no dictionary
                name, _, start = key.rpartition("@")
                self._index.setdefault(name, []).append((int(start), number, key))
        for stretches in self._index.values():
            stretches.sort()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened tensor called name, (stop - start,), fp32, on the CPU.

        Raises CheckpointError where the checkpoint does not hold all of them.
        """
        parts, at = [], start
        stretches = self._index.get(name, [])
        first = max(0, bisect_right(stretches, (start, len(self._files), "")) - 1)
        for begin, number, key in stretches[first:]:
            if at >= stop or begin > at:
                break
            values = self._files[number].get_slice(key)
            end = min(stop, begin + values.get_shape()[0])
            if end > at:
                parts.append(values[at - begin : end - begin])
                at = end
        if at < stop:
            raise CheckpointError(f"holds no {name}[{at}:{stop}]")
        return torch.cat(parts)

    def close(self) -> None:
        """Let go of the files, which keep their room on the disk meanwhile even when they are deleted; read no more."""
        self._files, self._index = [], {}


def newest_intact(out_dir: Path) -> tuple[CheckpointReader | None, list[str]]:
    """The newest checkpoint of a run that is whole, and one line for each newer one that is not."""
    skipped: list[str] = []
    for name, found in examine(out_dir):
        if isinstance(found, CheckpointReader):
            return found, skipped
        skipped.append(f"{name} {found}")
    return None, skipped


def examine(out_dir: Path) -> Iterator[tuple[str, CheckpointReader | CheckpointError]]:
    """(name, what it holds or what is wrong with it) of each checkpoint of a run, the newest first.

    Raises ConfigError when nobody can tell which there are.
    """
    try:
        checkpoints = _newest_first(out_dir / CHECKPOINTS)
    except OSError as error:
        raise ConfigError(f"{out_dir / CHECKPOINTS} cannot be read: {error.strerror or error}") from None
    for name, path in checkpoints:
        try:
            yield name, CheckpointReader(path)
        except CheckpointError as error:
            yield name, error


def _newest_first(directory: Path) -> list[tuple[str, Path]]:
    """(name, where it is) of each checkpoint; what else a person keeps there, under other names, is left alone."""
    try:
        found = os.listdir(directory)
    except FileNotFoundError:
        return []
    named = {name: directory / name for name in found if re.fullmatch(r"step_\d{8,}", name)}
    # A run that was killed while it put one in the place of another of the same step left that one here.
    replaced = {name[1:-4]: directory / name for name in found if re.fullmatch(r"\.step_\d{8,}\.old", name)}
    return sorted((replaced | named).items(), reverse=True)


def _name_latest(directory: Path, name: str) -> None:
    """Write into `latest` which checkpoint is the newest, for other programs."""
    with whole(directory / LATEST) as file:
        file.write(f"{name}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    _sync(directory)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """What was written to path is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
