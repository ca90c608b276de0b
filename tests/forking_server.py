"""Runs programs in processes that are forked from this one, which has imported torch: a start takes no second.

Each line of its input is [cwd, program, word, ...] in JSON, the program a script or a module; each of its output
[status, stdout, stderr].
"""

import json
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

import nanogpt.__main__  # what the programs import when they have read their options
import nanogpt.session  # noqa: F401

TIMEOUT_S = 300


def become(cwd: str, program: str, *words: str) -> None:
    """Run a program in this process, as Python would."""
    signal.alarm(TIMEOUT_S)
    os.chdir(cwd)
    sys.argv = [program, *words]
    if Path(program).exists():
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
    else:
        del sys.modules["nanogpt.__main__"]  # it is to run, not to be found
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def run_apart(request: list[str]) -> tuple[int, str, str]:
    """The same in a process of its own -> its status and what it has said. What Python does at its end is not done."""
    saying = {"mode": "w+", "encoding": "utf-8", "errors": "replace"}
    with tempfile.TemporaryFile(**saying) as out, tempfile.TemporaryFile(**saying) as err:
        if not (child := os.fork()):
            status: int | str | None = 1
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                become(*request)
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                if isinstance(status, str):  # as sys.exit has it
                    print(status, file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1 if isinstance(status, str) else status or 0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        return status, out.read(), err.read()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run_apart(json.loads(line))), flush=True)
