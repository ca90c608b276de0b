"""Two attempts of one Slurm job do not write the same run directory, whether or not the lock reaches both."""

import fcntl
import threading
import time

import pytest

from nanogpt.config.errors import ConfigError, RunError
from nanogpt.storage.run_lock import LOCK, Attempt, hold_run_dir, take_over

OLD, NEW, OTHER = Attempt("12", 0), Attempt("12", 1), Attempt("13", 0)


def test_the_older_attempt_is_fenced_off(tmp_path):
    """Invariant: where locks are not shared, an attempt writes until a later one begins, and not after."""
    old = OLD.raise_fence(tmp_path)
    old.check()
    new = NEW.raise_fence(tmp_path)
    new.check()
    old.check(every_s=60.0)  # it has just looked
    with pytest.raises(RunError, match=r"attempt 12\.1 has taken over .*: this attempt, 12\.0, ends"):
        old.check()


def test_an_older_attempt_does_not_come_back(tmp_path):
    """Invariant: a copy that starts late is refused, and the later attempt's fence stays."""
    with hold_run_dir(tmp_path, NEW) as fence:
        with pytest.raises(ConfigError, match="attempt 1 of job 12"):
            take_over(str(tmp_path), OLD)
        with pytest.raises(ConfigError, match="attempt 1 of job 12"), hold_run_dir(tmp_path, OLD):
            pass
        fence.check()


def test_a_later_attempt_waits_for_the_older_to_leave(tmp_path):
    """Invariant: it raises the fence, and looks for a checkpoint when the older attempt, fenced off, has let go."""
    seen = []

    def older():
        with hold_run_dir(tmp_path, OLD) as fence:
            seen.append("older")
            while len(seen) < 2:
                try:
                    fence.check()
                except RunError:
                    seen.append("left")
                time.sleep(0.01)

    thread = threading.Thread(target=older)
    thread.start()
    while not seen:
        time.sleep(0.01)
    take_over(str(tmp_path), NEW)
    seen.append("newer")
    with hold_run_dir(tmp_path, NEW):
        pass
    thread.join(timeout=10)
    assert seen == ["older", "left", "newer"]


def test_another_job_does_not_fence_off(tmp_path):
    """Invariant: a job that is started in a directory where another runs is refused at once and changes nothing."""
    with hold_run_dir(tmp_path, OLD) as fence:
        with pytest.raises(ConfigError, match="another run"), hold_run_dir(tmp_path, OTHER):
            pass
        fence.check()


def test_the_lock_ends_with_its_holder(tmp_path):
    """Invariant: another job may go on in the directory of one that has ended."""
    with hold_run_dir(tmp_path, OLD):
        pass
    with hold_run_dir(tmp_path, OTHER) as fence, (tmp_path / LOCK).open("a") as lock:
        fence.check()
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_which_attempt_this_is(monkeypatch, tmp_path):
    """Invariant: an empty count is the first attempt, a wrong one is refused, and a damaged fence keeps nobody out."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for count, number in (("", 0), ("3", 3)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        assert Attempt.from_env() == Attempt("12", number)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "many")
    with pytest.raises(ConfigError, match="SLURM_RESTART_COUNT=many must be a whole number"):
        Attempt.from_env()
    for damaged in (b"", b"12.x", b"12.\xff", b"12"):
        (tmp_path / ".attempt").write_bytes(damaged)
        take_over(str(tmp_path), NEW)
        with hold_run_dir(tmp_path, NEW) as fence:
            fence.check()


def test_a_job_that_slurm_gives_the_number_of_another(tmp_path, monkeypatch):
    """Invariant: by the name that slurm/train.sh gives it, it is no early attempt of the job that had its number."""
    with hold_run_dir(tmp_path, Attempt("12", 3)) as older:
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(ConfigError, match="attempt 3 of job 12"):
        take_over(str(tmp_path), Attempt.from_env())
    monkeypatch.setenv("RUN_JOB", "12-20260131T235959")
    take_over(str(tmp_path), Attempt.from_env())
    with hold_run_dir(tmp_path, Attempt.from_env()) as fence:
        fence.check()
        with pytest.raises(RunError, match=r"12-20260131T235959\.0 has taken over .*: this attempt, 12\.3, ends"):
            older.check()
