"""The browser that tests of pages start: which one, how it keeps quiet, and the skip where there is none."""

import os
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--disable-breakpad",
)  # fmt: skip


def chromium(directory, *words, timeout_s):
    """The command line of one that keeps its profile in directory; it ends after timeout_s should a test be killed."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install your distribution's package, chromium on Debian")
    own = [*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--user-data-dir={directory / 'profile'}"]
    return ["timeout", "--signal=KILL", str(timeout_s), CHROMIUM, *own, *words]
