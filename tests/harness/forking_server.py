"""Runs programs in processes that are forked from this one, which has imported torch: a start takes no second.

forking_server.py [MODULE ...] imports these too. A line of its input is JSON, and so is its answer:

{"cwd", "words", "ranks"}: a script or module with its words, and the environment of each process that is to run it; the
answer is [[status, stdout, stderr], ...], one of each process, when all have ended.
{..., "log"}: they write there, and go on; the answer is their [pid, ...].
{"pids"}: of such processes; the answer is [status or null while it runs, ...].
"""

import importlib
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path

import nanogpt.__main__  # what the programs import when they have read their options
import nanogpt.training.run  # noqa: F401
from nanogpt.data.tokenizer import encoding

TIMEOUT_S = 300
# What a program imports besides while it runs: DDP's constructor, and whoever draws a picture.
BESIDES = (
    "torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.cm", "matplotlib.collections", "matplotlib.figure",
    "matplotlib.layout_engine", "matplotlib.ticker",
)  # fmt: skip


def become(out: int, err: int, cwd: str, environ: dict[str, str], program: str, *words: str) -> None:
    """Run a program in this process, as Python would, from PYTHONPATH first; out, err: file descriptors."""
    for descriptor, its_own in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(descriptor, its_own)
    os.environ |= environ
    sys.path[1:1] = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(cwd)
    sys.argv = [program, *words]
    if Path(program).exists():
        sys.path[0] = str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")
    else:
        del sys.modules["nanogpt.__main__"]  # it is to run, not to be found
        runpy.run_module(program, run_name="__main__", alter_sys=True)


STARTED: dict[int, BaseProcess] = {}


def start(cwd: str, words: list[str], ranks: list[dict[str, str]], log: str) -> list[int]:
    """Begin to run a program in processes of their own."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pids = []
    for environ in ranks:
        process = multiprocessing.get_context("fork").Process(target=become, args=(file, file, cwd, environ, *words))
        process.start()
        STARTED[process.pid] = process
        pids.append(process.pid)
    os.close(file)
    return pids


def statuses(pids: list[int]) -> list[int | None]:
    """Of processes that start() has begun."""
    return [STARTED[pid].exitcode for pid in pids]


def run_apart(cwd: str, words: list[str], ranks: list[dict[str, str]]) -> list[tuple[int | None, str, str]]:
    """The same in processes of their own -> the status of each, killed after TIMEOUT_S, and what it has said.

    What Python does at its end is not done.
    """
    saying = {"mode": "w+", "encoding": "utf-8", "errors": "replace"}
    with ExitStack() as files:
        said = [[files.enter_context(tempfile.TemporaryFile(**saying)) for _ in ("out", "err")] for _ in ranks]
        processes = [
            multiprocessing.get_context("fork").Process(
                target=become, args=(out.fileno(), err.fileno(), cwd, environ, *words)
            )
            for (out, err), environ in zip(said, ranks, strict=True)
        ]
        give_up = time.monotonic() + TIMEOUT_S
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, give_up - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        for file in (file for both in said for file in both):
            file.seek(0)
        return [(p.exitcode, out.read(), err.read()) for p, (out, err) in zip(processes, said, strict=True)]


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module says when it is imported is no answer
    for module in (*BESIDES, *sys.argv[1:]):
        importlib.import_module(module)
    encoding()  # which reads the vocabulary, once
    for line in sys.stdin:
        request = json.loads(line)
        serve = statuses if "pids" in request else start if "log" in request else run_apart
        print(json.dumps(serve(**request)), file=answers, flush=True)
