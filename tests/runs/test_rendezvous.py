"""A rank whose peers never come."""

import os
import re
import signal
import subprocess
import sys

import pytest

from harness.runs import SHORT, environment, flags, free_port


@pytest.mark.parametrize("how", ["SIGUSR1", "SIGTERM", "comm_timeout_s"])
def test_a_rank_alone(how, tmp_path):
    """Invariant: asked to stop it leaves with status 4, killed it is at once, else 1 and one line; nothing is made.

    Today's time-out of a process group is eleven minutes.
    """
    env = environment(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    options = flags(**SHORT, out_dir="out", comm_timeout_s=1 if how == "comm_timeout_s" else 300)
    program = """
import train_overfit
from nanogpt.distributed import rendezvous
rendezvous.LINE_S = 0.1
train_overfit.main(train_overfit.run)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, *options], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert re.fullmatch(r"waiting for the other ranks for \d+ s: .*\n", process.stdout.readline())
        if how != "comm_timeout_s":
            process.send_signal(getattr(signal, how))
        out, err = process.communicate(timeout=60)
    if how == "comm_timeout_s":
        line = "error: 1 of 2 ranks connected, rank 1 is missing: gave up after 1 s (--comm_timeout_s)\n"
        assert (process.returncode, err) == (1, line)
    elif how == "SIGTERM":
        assert (process.returncode, err) == (-signal.SIGTERM, "")
    else:
        assert (process.returncode, err) == (4, "")
        assert out.endswith("asked to stop while other ranks were missing\n")
    assert os.listdir(tmp_path) == []
