"""Programs without their start: forked from a process of this session that has imported what they import."""

import functools
import json
import signal
import subprocess
import sys

from harness.runs import REPOSITORY, TRAIN, environment, free_port

ENVIRON = environment(OMP_NUM_THREADS="1")  # as it is before a test changes it


@functools.cache
def _server(*modules):
    """The forking_server.py that has imported these modules too; it ends when this process does, with its input."""
    command = [sys.executable, REPOSITORY / "tests" / "harness" / "forking_server.py", *modules]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRON, **pipes)


def _ask(cwd, words, ranks, modules):
    """One request to a server -> CompletedProcess of each rank."""
    words, server = [*map(str, words)], _server(*modules)
    print(json.dumps({"cwd": str(cwd), "words": words, "ranks": ranks}), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    assert answer, f"forking_server.py ended: {server.wait()}"
    done = [subprocess.CompletedProcess(words, *one) for one in json.loads(answer)]
    assert -signal.SIGKILL not in [one.returncode for one in done], f"timed out: {words}, {done}"
    return done


def forked(cwd, *words, **env):
    """Run a script or module to its end on one thread -> CompletedProcess, as run() does."""
    (done,) = _ask(cwd, words, [env], ())
    return done


def train(*words, cwd):
    """python train_overfit.py WORDS, but for its start"""
    return forked(cwd, TRAIN, *words)


def forked_ranks(ranks, cwd, *words):
    """The same as ranks of one world, as srun starts them -> CompletedProcess: all that they say, and their status.

    They have one status or the test fails. DeepSpeed is imported already.
    """
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    envs = [{name: str(value) for name, value in (world | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(ranks)]
    done = _ask(cwd, words, envs, ("deepspeed",))
    said, errors = "".join(one.stdout for one in done), "".join(one.stderr for one in done)
    statuses = [one.returncode for one in done]
    assert len(set(statuses)) == 1, (statuses, said, errors)
    return subprocess.CompletedProcess(words, statuses[0], said, errors)
