"""What a lost run directory is."""

import shutil

from nanogpt.storage.run_dir import CONFIG
from nanogpt.storage.run_lock import Attempt, hold_run_dir, loss_of
from nanogpt.utils import signals
from nanogpt.utils.signals import LOST, StopSignals


def test_the_shared_disk_is_asked_once_a_second(tmp_path, monkeypatch):
    """Invariant: a file STOP that comes within a second of the last look is found by the first look after it."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopSignals() as stop:
        stop.look_in(tmp_path, lambda: False)
        assert not stop.requested
        (tmp_path / "STOP").touch()
        now[0] += 0.9
        assert not stop.requested
        now[0] += 0.2
        assert stop.requested


def test_what_a_lost_directory_is(tmp_path, monkeypatch):
    """Invariant: one that was removed, emptied, moved or replaced; a file system's passing error is none."""
    monkeypatch.setattr(signals, "LOOK_S", 0.0)
    for how in ("removed", "emptied", "moved", "replaced"):
        out_dir, elsewhere = tmp_path / "out", tmp_path / f"{how}.aside"
        with hold_run_dir(out_dir, Attempt("", 0)):
            (out_dir / CONFIG).touch()
            stop = StopSignals()
            stop.__exit__()
            stop.look_in(out_dir, loss_of(out_dir))
            assert not stop.requested
            if how == "emptied":
                (out_dir / CONFIG).unlink()
            elif how == "removed":
                shutil.rmtree(out_dir)
            else:
                out_dir.rename(elsewhere)
            if how == "replaced":
                shutil.copytree(elsewhere, out_dir)
            assert (stop.requested, stop.name) == (True, LOST), how
        shutil.rmtree(out_dir, ignore_errors=True)
