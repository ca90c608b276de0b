"""The browser that tests of pages start: which one, how it keeps quiet, the skip where there is none, and its reins."""

import json
import os
import select
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from fcntl import F_DUPFD, fcntl

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--disable-breakpad",
)  # fmt: skip
TIMEOUT_S = 60
KEYS = {
    "Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
    "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip
# The texts that are too pale for their paper.
PALE = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const linear = c => c / 255 <= .04045 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const paper = e => {
    const color = numbers(getComputedStyle(e).backgroundColor);
    return color[3] === 0 ? paper(e.parentElement) : color;
  };
  const found = [];
  for (const e of document.body.querySelectorAll("*")) {
    const words = [...e.childNodes].filter(n => n.nodeType === Node.TEXT_NODE && n.data.trim());
    if (!words.length || !e.checkVisibility() || e.closest("title, script")) continue;
    const style = getComputedStyle(e), ink = e.matches("text") ? style.fill : style.color;
    const [low, high] = [light(numbers(ink)), light(paper(e))].sort((a, b) => a - b);
    const contrast = (high + .05) / (low + .05);
    if (contrast < 4.5) found.push(`${contrast.toFixed(1)}: ${e.outerHTML.slice(0, 80)}`);
  }
  return found;
})()"""


def chromium(directory, *words, timeout_s):
    """The command line of one that keeps its profile in directory; it ends after timeout_s should a test be killed."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install your distribution's package, chromium on Debian")
    own = [*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--user-data-dir={directory / 'profile'}"]
    return ["timeout", "--signal=KILL", str(timeout_s), CHROMIUM, *own, *words]


class Browser:
    """Chromium that opens one page and does as it is told, over two pipes: DevTools' protocol, one JSON a NUL."""

    def __init__(self, directory):
        its_input, self.output = os.pipe()
        self.input, its_output = os.pipe()
        theirs = [fcntl(fd, F_DUPFD, 10) for fd in (its_input, its_output)]  # clear of the 3 and 4 that it wants
        words = chromium(directory, "--hide-scrollbars", "--remote-debugging-pipe", timeout_s=3 * TIMEOUT_S)
        self.log = directory / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", *words],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"HOME": str(directory)},
            )
        for fd in (its_input, its_output, *theirs):
            os.close(fd)
        self.buffer, self.last, self.session, self.events = b"", 0, None, []

    def start(self):
        """A page of its own."""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self(f"{domain}.enable")
        self("Emulation.setFocusEmulationEnabled", enabled=True)  # Tab after the page's end leads out of it

    def __call__(self, method, **params):
        """What the browser answers to a command; what it tells meanwhile goes to events."""
        self.last += 1
        command = {"id": self.last, "method": method, "params": params}
        command |= {"sessionId": self.session} if self.session else {}
        os.write(self.output, json.dumps(command).encode() + b"\0")
        while (message := self._next()).get("id") != self.last:
            self.events.append(message)
        assert "error" not in message, (method, message)
        return message["result"]

    def _next(self):
        until = time.monotonic() + TIMEOUT_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.input], [], [], max(0, until - time.monotonic()))
            part = os.read(self.input, 2**16) if ready else b""
            if not part:
                raise EOFError(self.log.read_text()[-2000:])
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path, width, *, dark=False, scripts=True):
        """A file, in a window of that width."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        self.wait_for_load()

    def wait_for_load(self):
        """Until the page that events tell of is there."""
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression):
        """The value of a JavaScript expression in the page, or what it promises."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        """One key, as a person's: unlike an event that a script makes, the browser acts on it."""
        keys = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": {"Enter": "\r"}.get(key, key)} if key in ("Enter", " ") else {}
        self("Input.dispatchKeyEvent", type="keyDown", **keys, **text)
        self("Input.dispatchKeyEvent", type="keyUp", **keys)

    def close(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.input)
        os.close(self.output)


@contextmanager
def started(directory):
    """A Browser with a page of its own; skips where there is none."""
    browser = Browser(directory)
    try:
        try:
            browser.start()
        except (EOFError, BrokenPipeError) as error:
            pytest.skip(f"{CHROMIUM} does not start: {error}")
        yield browser
    finally:
        browser.close()
