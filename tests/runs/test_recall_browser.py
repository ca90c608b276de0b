"""The page in a browser: whoever walks through its losses with the keyboard or points at them is told of every one."""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from threading import Thread

import pytest

from harness.chromium import CHROMIUM, chromium
from harness.recited import AWKWARD, TITLE, Page, long_text, pieces_of, recited
from nanogpt.data.tokenizer import encode
from nanogpt.plots.recall_html import make_page

TIMEOUT_S = 60
CLOSED = "default-src 'none'"  # the page may connect to nothing; with a visitor in it, to its server
TEXT = AWKWARD + long_text(25)
# Added to the page: it does what a person does, and sends to its server what the card then told.
VISITOR = """
<script>
const report = body => fetch("/", { method: "POST", body });
addEventListener("unhandledrejection", event => report(event.reason.stack));
addEventListener("error", event => report(event.message));
addEventListener("load", async () => {
  const told = () => card.hidden ? null : {
    about: card.querySelector("p").textContent,
    words: [...card.querySelectorAll("mark")].map(mark => mark.textContent),
    seen: card.getBoundingClientRect().top >= 0 && card.getBoundingClientRect().bottom <= innerHeight,
  };
  const frames = async count => { for (; count > 0; count--) await new Promise(requestAnimationFrame); };
  const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
  const walk = async key => {
    for (const places = [];;) {
      const last = cursor;
      press(key);
      await frames(2);
      if (cursor === last) return places;
      places.push(told());
    }
  };
  const result = { hops: await walk("n"), hops_back: await walk("p") };
  text.focus();
  cursor = null;
  hide();
  result.losses = await walk("ArrowRight");
  result.losses_back = await walk("ArrowLeft");
  press("Escape");
  result.escaped = told();
  result.pointed = [];
  const plain = text.textContent.indexOf("Line 0 is");
  for (let h = 0; h < data.hops.length; h++) {
    for (let i = 0; i < data.hops[h][4].length; i++) {
      if (data.hops[h][4][i] === null) continue;
      const [, , start] = at(h, i), words = content(start, start + data.hops[h][2][i]);
      const ink = start + Math.max(0, words.search(/\\S/));  // a blank may hang at the end of a line
      if (start < plain) continue;
      scrollToCharacter(ink, 0.5);
      await frames(3);  // the page hears of a scroll in the first, and hides its card in the next
      const box = rangeOf(ink, ink + 1).getBoundingClientRect();
      const where = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true };
      document.elementFromPoint(where.clientX, where.clientY).dispatchEvent(new PointerEvent("pointermove", where));
      await frames(2);
      result.pointed.push(told());
    }
  }
  scrollTo(0, 0);
  await frames(3);
  result.began_at = scrollY;
  place.value = data.places.length - 1;
  place.dispatchEvent(new Event("input"));
  await frames(3);
  result.ended_at = scrollY;
  result.end = document.documentElement.scrollHeight - innerHeight;
  report(JSON.stringify(result));
});
</script>
"""
NAMES = {"p": "predicted from the true text, but not recited", "w": "wrong"}


class Site(ThreadingHTTPServer):
    """Serves one page on this machine, and keeps what its visitor sends back."""

    def __init__(self, page: str) -> None:
        super().__init__(("127.0.0.1", 0), Visit)
        self.page, self.told, self.visits = page.encode(), Queue(), 0


class Visit(BaseHTTPRequestHandler):
    """One request to a Site."""

    server: Site

    def do_GET(self) -> None:
        """The page, whatever is asked for."""
        self.server.visits += 1
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.server.page)

    def do_POST(self) -> None:
        """The visitor's report."""
        self.server.told.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """(the data that the page's script reads, what a visitor was told)."""
    directory = tmp_path_factory.mktemp("browser")
    page = make_page(recited(TEXT), TITLE)
    assert page.count(CLOSED) == 1
    visitors = page.replace(CLOSED, f"{CLOSED}; connect-src 'self'").replace("</body>", VISITOR + "</body>")
    log = directory / "log"
    with Site(visitors) as site, log.open("w") as output:
        Thread(target=site.serve_forever, daemon=True).start()
        browser = subprocess.Popen(
            chromium(
                directory, "--window-size=1280,900", f"http://127.0.0.1:{site.server_port}/", timeout_s=2 * TIMEOUT_S
            ),
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | {"HOME": str(directory)},
        )
        try:
            told = _answer(site, browser, log)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            site.shutdown()
    assert told.startswith("{"), told
    return json.loads(Page(page).json), json.loads(told)


def _answer(site, browser, log):
    for _ in range(TIMEOUT_S):
        with suppress(Empty):
            return site.told.get(timeout=1)
        if browser.poll() is not None:
            break
    if browser.poll() is not None and not site.visits:
        pytest.skip(f"{CHROMIUM} does not start: {log.read_text()[-500:]}")
    pytest.fail(f"{CHROMIUM} asked for the page {site.visits} times and did not answer: {log.read_text()[-2000:]}")


def losses(data):
    """What the card should tell of every lost piece, hop by hop: (its first token, the true words, what was said)."""
    for hop in pieces_of(data, TEXT):
        yield [(token, shown(piece), shown(words)) for token, _, piece, words in hop if words is not None]


def shown(words):
    """Words as the card has them: what has no ink as signs, a carriage return always."""
    signs = {"\r": "␍"} if words.strip() else {" ": "␣", "\t": "⇥", "\r": "␍", "\n": "↵"}
    return words.translate(str.maketrans(signs)) or "◌"


def tellings(places):
    """(first token, true words, what was said) of each place."""
    found = []
    for place in places:
        number = re.fullmatch(rf"token ([\d,]+) of [\d,]+: ({'|'.join(NAMES.values())})", place["about"])
        found.append((int(number[1].replace(",", "")) - 1, *place["words"]))
        assert place["seen"], f"the card of {place} is not in the window"
    return found


def test_every_loss_is_told_of(visited):
    """Reference: the page's data, which other tests compare with the arrays: each lost piece once, forth and back."""
    data, told = visited
    expected = list(losses(data))
    each, firsts = [loss for hop in expected for loss in hop], [hop[0] for hop in expected]
    assert len(each) > len(firsts) > 10
    assert tellings(told["losses"]) == each
    assert tellings(told["losses_back"]) == each[-2::-1]
    assert tellings(told["hops"]) == firsts
    assert tellings(told["hops_back"]) == firsts[-2::-1]


def test_pointing_at_a_loss_tells_of_it(visited):
    """Reference: as above, of the plain lines; where the pointer is, not where the keyboard was.

    Beside a joined emoji, of which Chromium gives no parts, the card tells of the neighbour.
    """
    data, told = visited
    plain = len(encode(AWKWARD))
    expected = [loss for hop in losses(data) for loss in hop if loss[0] > plain]
    assert len(expected) > 20
    assert tellings(told["pointed"])[-len(expected) :] == expected


def test_the_card_goes_and_the_overview_leads_to_the_end(visited):
    """Invariant: Escape hides the card; the overview's last column is the end of the page."""
    _, told = visited
    assert told["escaped"] is None
    assert told["began_at"] == 0
    assert told["ended_at"] == pytest.approx(told["end"], abs=1)  # pixels are fractions on some screens
    assert told["end"] > 0
