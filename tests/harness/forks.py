"""Programs without their start: forked from a process of this session that has imported what they import."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness.runs import REPOSITORY, TRAIN, WORKERS, environment, free_port

# The benchmark of loops that others wrote, and what it imports: ten seconds of a core.
BESIDE_TRANSFORMERS = ("plain_loop.py",)
TRANSFORMERS = ("transformers.models.gpt2.modeling_gpt2", "transformers.trainer")
ENVIRON = environment(OMP_NUM_THREADS="1")  # as it is before a test changes it


@functools.cache
def _server(*modules):
    """The forking_server.py that has imported these modules too; it ends when this process does, with its input."""
    command = [sys.executable, REPOSITORY / "tests" / "harness" / "forking_server.py", *modules]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRON, **pipes)


def _ask(modules, **request):
    """The answer of a server."""
    server = _server(*modules)
    print(json.dumps(request), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    assert answer, f"forking_server.py ended: {server.wait()}"
    return json.loads(answer)


def _run(modules, cwd, words, ranks):
    """Run to the end -> CompletedProcess of each rank."""
    words = [*map(str, words)]
    done = [subprocess.CompletedProcess(words, *one) for one in _ask(modules, cwd=str(cwd), words=words, ranks=ranks)]
    assert -signal.SIGKILL not in [one.returncode for one in done], f"timed out: {words}, {done}"
    return done


def _world(ranks):
    """The environment of each rank of a world on a free port."""
    same = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [{name: str(value) for name, value in (same | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(ranks)]


def forked(cwd, *words, **env):
    """Run a script or module to its end on one thread -> CompletedProcess, as run() does."""
    (done,) = _run(TRANSFORMERS if Path(words[0]).name in BESIDE_TRANSFORMERS else (), cwd, words, [env])
    return done


def train(*words, cwd):
    """python train_overfit.py WORDS, but for its start"""
    return forked(cwd, TRAIN, *words)


def forked_ranks(ranks, cwd, *words, **env):
    """The same as ranks of one world, as srun starts them -> CompletedProcess: all that they say, and their status.

    They have one status or the test fails.
    """
    done = _run(_imported(words), cwd, words, [rank | env for rank in _world(ranks)])
    said, errors = "".join(one.stdout for one in done), "".join(one.stderr for one in done)
    statuses = [one.returncode for one in done]
    assert len(set(statuses)) == 1, (statuses, said, errors)
    return subprocess.CompletedProcess(words, statuses[0], said, errors)


def _imported(words):
    """What its server has imported: DeepSpeed where that may train, transformers for its loop, and nowhere else."""
    program, *options = map(str, words)
    if Path(program).name in BESIDE_TRANSFORMERS:
        return TRANSFORMERS
    return ("deepspeed",) if "--engine=deepspeed" in options or Path(program).parent == WORKERS else ()


class ForkedProgram:
    """The same in the background: ranks of one world that write to a log."""

    def __init__(self, ranks, cwd, log, *words, **env):
        world = [rank | env for rank in (_world(ranks) if ranks > 1 else [{}])]
        request = {"cwd": str(cwd), "words": [*map(str, words)], "ranks": world, "log": str(log)}
        self._modules = _imported(words)
        self.pids = _ask(self._modules, **request)

    def poll(self):
        """The status of the first rank that has ended, None while all run."""
        return next((status for status in self._statuses() if status is not None), None)

    def send_signal(self, number):
        """To all of them that run."""
        for pid, status in zip(self.pids, self._statuses(), strict=True):
            if status is None:
                os.kill(pid, number)

    def terminate(self):
        """SIGTERM for all of them."""
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout):
        """The status that all of them leave with."""
        give_up = time.monotonic() + timeout
        while None in (statuses := self._statuses()):
            assert time.monotonic() < give_up, "timed out"
            time.sleep(0.01)
        (status,) = set(statuses)
        return status

    def kill(self):
        """SIGKILL for all of them, and wait until they are gone."""
        self.send_signal(signal.SIGKILL)
        while None in self._statuses():
            time.sleep(0.01)

    def _statuses(self):
        return _ask(self._modules, pids=self.pids)
