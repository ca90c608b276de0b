"""Runs python -m nanogpt as a shell would with its output redirected: PROGRAM HOW COMMAND ..., of forked processes too.

HOW: "full" (> /dev/full), "closed" (>&- 2>&- <&-), or an encoding, as PYTHONIOENCODING gives it.
"""

import os
import runpy
import sys

how = sys.argv.pop(1)
if how == "full":
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
elif how == "closed":
    for descriptor in range(3):
        os.close(descriptor)
    sys.stdin = sys.stdout = sys.stderr = None  # as Python begins then
else:
    sys.stdout.reconfigure(encoding=how, errors="strict")
sys.modules.pop("nanogpt.__main__", None)
runpy.run_module("nanogpt", run_name="__main__", alter_sys=True)
