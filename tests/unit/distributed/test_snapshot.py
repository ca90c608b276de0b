"""What is taken to the host is what a device held when it was asked, by a stand-in for a GPU whose copies come late."""

from contextlib import contextmanager
from threading import Event

import pytest
import torch

from harness.runs import ALONE
from nanogpt.distributed import snapshot as module
from nanogpt.distributed.snapshot import DeviceCopies, snapshot, through
from nanogpt.storage.checkpoint import CheckpointWriter, Piece, newest_intact

VALUES = torch.arange(100, dtype=torch.float32)


class Late(torch.Tensor):
    """Pinned memory: what is copied to it without blocking arrives when it is waited for, as it is by then."""

    pending = []  # noqa: RUF012, of the only device there is

    def copy_(self, source, non_blocking=False):
        if non_blocking:
            self.pending.append((self.as_subclass(torch.Tensor), source))
            return self
        return super().copy_(source)

    @classmethod
    def arrive(cls):
        for part, source in cls.pending:
            part.copy_(source)
        cls.pending.clear()


class Gpu:
    """What DeviceCopies asks of torch.cuda, and in which order."""

    def __init__(self, monkeypatch):
        self.asked = []
        self.may_arrive = Event()
        self.may_arrive.set()
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        for name in ("current_stream", "set_device", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        empty = torch.empty

        def pinned(*shape, pin_memory=False, **options):
            if not pin_memory:
                return empty(*shape, **options)
            self.asked.append("pinned memory")
            return empty(*shape, **options).as_subclass(Late)

        monkeypatch.setattr(torch, "empty", pinned)
        monkeypatch.setattr(module, "STAGED_VALUES", 30)

    def current_stream(self, _):
        return self

    def record_event(self):
        self.asked.append("event")
        return "event"

    def set_device(self, _):
        self.asked.append("device")

    def new_stream(self, _):
        self.asked.append("stream aside")
        return self

    def wait_event(self, event):
        self.asked.append(f"wait for {event}")

    @contextmanager
    def stream(self, _):
        self.asked.append("aside")
        yield
        self.asked.append("back")

    def synchronize(self):
        assert self.may_arrive.wait(timeout=60)
        self.asked.append(f"{len(Late.pending)} copy")
        Late.arrive()


@pytest.mark.parametrize("size", [1, 6, 7, 8, 14, 100])
def test_parts_arrive_before_they_are_read(size):
    """Reference: the values; a part that is read before its copy is waited for, or overwritten, would show."""
    staging = torch.full((7,), float("nan")).as_subclass(Late)
    assert torch.equal(through(staging, VALUES[:size], wait=Late.arrive), VALUES[:size])
    assert Late.pending == []


def test_a_checkpoint_is_of_the_moment_when_it_was_begun(tmp_path, monkeypatch):
    """Invariant: what training writes while the thread still waits for the device is not in the file."""
    gpu = Gpu(monkeypatch)
    weights, moments = VALUES.clone(), VALUES.to(torch.bfloat16)
    gpu.may_arrive.clear()
    writer = CheckpointWriter(tmp_path, ALONE, keep=1, on_device=True)
    writer.begin(1, [Piece("weight/a", 0, weights[:40]), Piece("exp_avg/a", 0, moments)], {})
    assert writer.writing
    weights.fill_(-1)
    moments.fill_(-1)
    gpu.may_arrive.set()
    assert writer.commit() == ""
    # The event stands behind the copies on the device, and the side stream waits for it before it reads them.
    before = ["event", "device", "stream aside", "wait for event", "pinned memory", "aside"]
    assert gpu.asked == [*before, *["1 copy"] * (2 + 4), "back"]
    monkeypatch.undo()
    checkpoint = newest_intact(tmp_path)[0]
    assert torch.equal(checkpoint.read("weight/a", 0, 40), VALUES[:40])
    assert torch.equal(checkpoint.read("exp_avg/a", 0, 100), VALUES.to(torch.bfloat16).float())


def test_a_copy_is_let_go_of_when_it_has_arrived(monkeypatch):
    """Invariant: as long as the side stream may read a copy something refers to it, and no longer."""
    gpu = Gpu(monkeypatch)
    copies = DeviceCopies({"a": VALUES[:40], "b": VALUES})
    held = []
    synchronize = gpu.synchronize

    def look():
        held.append(list(copies._copies))
        synchronize()

    monkeypatch.setattr(gpu, "synchronize", look)
    assert [len(values) for values in copies.on_host().values()] == [40, 100]
    assert held == [["a", "b"]] * 2 + [["b"]] * 4
    assert copies._copies == {}


def test_a_device_without_room_is_waited_for(monkeypatch):
    """Reference: the values at the time; where the device's allocator refuses, the copy is made on the host at once."""
    gpu = Gpu(monkeypatch)

    def refuse(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(DeviceCopies, "__init__", refuse)
    values = VALUES.clone()
    on_host = snapshot({"a": values}, on_device=True)
    values.fill_(-1)
    assert torch.equal(on_host()["a"], VALUES)
    assert gpu.asked == []


def test_a_cpu_copies_at_once():
    """Reference: the values at the time, whether or not the device has room: its memory is the host's."""
    for on_device in (False, True):
        values = VALUES.clone()
        on_host = snapshot({"a": values}, on_device=on_device)
        values.fill_(-1)
        assert torch.equal(on_host()["a"], VALUES)
