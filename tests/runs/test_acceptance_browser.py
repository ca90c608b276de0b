"""acceptance.html in a browser: opened as a file, at three widths, in light and dark, with the keyboard alone."""

import json
import os
import re
import select
import signal
import subprocess
import time
from contextlib import suppress
from fcntl import F_DUPFD, fcntl

import pytest

from harness.chromium import CHROMIUM, chromium
from nanogpt.acceptance.page import Page, StageRow, make_page
from nanogpt.acceptance.verdict import Check, PerRank, Verdict
from nanogpt.plots.band_chart import Curve

TIMEOUT_S = 60
WIDTHS = (390, 800, 1600)
KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39}
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
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        """One key, as a person's: unlike an event that a script makes, the browser acts on it."""
        keys = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self("Input.dispatchKeyEvent", type="keyDown", **keys, **text)
        self("Input.dispatchKeyEvent", type="keyUp", **keys)

    def close(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.input)
        os.close(self.output)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One for all tests; skips where there is none."""
    browser = Browser(tmp_path_factory.mktemp("browser"))
    try:
        try:
            browser.start()
        except (EOFError, BrokenPipeError) as error:
            pytest.skip(f"{CHROMIUM} does not start: {error}")
        yield browser
    finally:
        browser.close()


def sick(hosts, per_host):
    """A page whose second host is slow, with a curve that leaves its band, and long words that do not want to break."""
    names = tuple(f"a-host-with-a-long-name-{rank // per_host}.cluster.example" for rank in range(hosts * per_host))
    slow = tuple(range(per_host, 2 * per_host))
    values = tuple(148.0 if rank in slow else 361.0 + rank % 3 for rank in range(len(names)))
    golden = tuple(11 - step / 4 for step in range(30))
    measured = tuple(loss * (1.2 if step > 20 else 1.001) for step, loss in enumerate(golden))
    failed = Check(name="all_reduce", verdict=Verdict.FAIL, found="x" * 200, expected="y" * 200, ranks=slow)
    passed = Check(name="bits", verdict=Verdict.PASS, found="equal", expected="equal")
    return Page(
        verdict=Verdict.FAIL,
        headline=f"FAIL: {names[slow[0]]}",
        facts=(("when", "2026-11-30 12:03 UTC"), ("program", "z" * 200)),
        exclude=f"--exclude={','.join(dict.fromkeys(names))}",
        stages=(
            StageRow("compute", "products", Verdict.PASS, 62.0, (passed,)),
            StageRow("network", "collectives " * 20, Verdict.FAIL, 81.0, (failed, passed)),
        ),
        hosts=names,
        per_rank=tuple(PerRank(name=name, values=values) for name in ("all_reduce, GB/s", "w" * 90)),
        curves=tuple(Curve(f"fp32, {name}", measured, golden, (0.01,) * 30) for name in ("ddp", "v" * 90)),
    )


@pytest.fixture(scope="module", params=[(2, 1), (4, 4), (64, 8)], ids=["2 ranks", "16 ranks", "512 ranks"])
def path(request, tmp_path_factory):
    """The page of a sick cluster, in a file."""
    path = tmp_path_factory.mktemp("page") / "acceptance.html"
    path.write_text(make_page(sick(*request.param)), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_the_page_fits_its_window(browser, path, width, dark, scripts):
    """Invariant: nothing is wider than the window, the colours are of the scheme, and no other file is asked for."""
    browser.open(path, width, dark=dark, scripts=scripts)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    wide = "[...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert browser.ask(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []
    red, green, blue, *_ = map(float, re.findall(r"[\d.]+", browser.ask("getComputedStyle(document.body).color")))
    assert (red + green + blue > 384) == dark, "light ink on dark paper, or the other way round"
    asked = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    assert [request["request"]["url"] for request in asked] == [path.as_uri()]
    assert browser.ask("document.querySelector('button').checkVisibility()") == scripts


def test_text_can_be_read_on_what_is_behind_it(browser, path):
    """Reference: WCAG 2.2's contrast of 4.5 to 1, of all text that is seen, in light and in dark."""
    for dark in (False, True):
        browser.open(path, 1600, dark=dark)
        assert browser.ask(PALE) == []


def test_the_keyboard_opens_a_stage_and_goes_through_the_ranks(browser, path):
    """Invariant: Tab comes to each stage, Enter opens it, and arrow keys show the figures of host after host."""
    browser.open(path, 800, scripts=False)
    assert browser.ask("[...document.querySelectorAll('.stage')].map(e => e.open)") == [False, True]
    stages = 0
    for _ in range(40):
        browser.press("Tab")
        if browser.ask("document.activeElement.matches('.stage > summary:not([seen])')"):
            browser.ask("document.activeElement.setAttribute('seen', '')")
            browser.press("Enter")
            stages += 1
        if browser.ask("document.activeElement.matches('input')"):
            break
    assert stages == 2
    assert browser.ask("[...document.querySelectorAll('.stage')].map(e => e.open)") == [True, False]
    assert browser.ask("document.querySelector('.stage table').checkVisibility()") is True
    hosts = browser.ask("document.querySelectorAll('.row:first-of-type input').length")
    assert hosts in (0, 64), "where figures are not seen, a host is a place to go to"
    shown = "(e => [e.innerText, e.getBoundingClientRect().left, e.getBoundingClientRect().right])"
    for number in range(min(hosts, 3)):
        words, left, right = browser.ask(f"{shown}(document.activeElement.parentElement.querySelector('span'))")
        assert words.startswith(f"a-host-with-a-long-name-{number}.cluster.example {8 * number}")
        assert ("148" in words) == (number == 1)
        assert 0 <= left < left + 300 < right <= 800
        browser.press("ArrowRight")


def test_the_button_copies_the_exclude_list(browser, path):
    """Reference: the page's --exclude line, whole, pasted where the browser may not lend its clipboard too."""
    for lent in (True, False):
        browser.open(path, 800)
        if not lent:
            browser.ask("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        browser.ask("document.addEventListener('copy', () => { window.copied = String(getSelection()); })")
        browser.ask("navigator.clipboard && (navigator.clipboard.writeText = async text => { window.copied = text; })")
        browser("Runtime.evaluate", expression="document.querySelector('button').click()", userGesture=True)
        browser.ask("new Promise(requestAnimationFrame)")
        expected = browser.ask("document.querySelector('code').textContent")
        assert expected.startswith("--exclude=a-host")
        assert browser.ask("window.copied") == expected
        assert browser.ask("document.querySelector('button').textContent") == "Copied"
