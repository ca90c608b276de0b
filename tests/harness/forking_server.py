"""Runs programs in processes that are forked from this one, which has imported torch: a start takes no second.

Each line of its input is [cwd, program, word, ...] in JSON, the program a script or a module; each of its output
[status, stdout, stderr].
"""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

import nanogpt.__main__  # what the programs import when they have read their options
import nanogpt.training.run  # noqa: F401

TIMEOUT_S = 300


def become(out: int, err: int, cwd: str, program: str, *words: str) -> None:
    """Run a program in this process, as Python would; out, err: file descriptors."""
    for descriptor, its_own in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(descriptor, its_own)
    os.chdir(cwd)
    sys.argv = [program, *words]
    if Path(program).exists():
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
    else:
        del sys.modules["nanogpt.__main__"]  # it is to run, not to be found
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def run_apart(request: list[str]) -> tuple[int | None, str, str]:
    """The same in a process of its own -> its status, killed after TIMEOUT_S, and what it has said.

    What Python does at its end is not done.
    """
    saying = {"mode": "w+", "encoding": "utf-8", "errors": "replace"}
    with tempfile.TemporaryFile(**saying) as out, tempfile.TemporaryFile(**saying) as err:
        process = multiprocessing.get_context("fork").Process(
            target=become, args=(out.fileno(), err.fileno(), *request)
        )
        process.start()
        process.join(TIMEOUT_S)
        process.kill()
        process.join()
        out.seek(0), err.seek(0)
        return process.exitcode, out.read(), err.read()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run_apart(json.loads(line))), flush=True)
