"""memory.html in a browser: opened as a file, with slider, keyboard and pointer, while a run goes on and after it."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest

from harness.chromium import PALE, started
from harness.memories import bytes_of, memory
from harness.recited import AWKWARD
from nanogpt.data.corpus import read_corpus
from nanogpt.token_losses.history import UNSEEN
from nanogpt.token_losses.page import make_page
from nanogpt.token_losses.scale import NO_SHADE, shade_of_level

pytestmark = pytest.mark.slow
TOKENS = bytes_of(read_corpus("builtin").text, 2048)
TEXT = b"".join(TOKENS).decode()
HISTORY, CURVE = memory(TOKENS)
STEPS = HISTORY.steps.tolist()
MOST_ELEMENTS = 4000
SHADES = "spans.map(span => Number(span.className.slice(1).split(' ')[0]))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One for all tests; skips where there is none."""
    with started(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def write(path, history=HISTORY, tokens=TOKENS, *, is_running=False, reload_ms=10**8):
    """A page; one of a run that goes on loads itself again every reload_ms."""
    page = make_page(history, tokens, CURVE, title="A text", is_running=is_running)
    assert page.count("RELOAD_MS = 5000") == 1
    path.write_text(page.replace("RELOAD_MS = 5000", f"RELOAD_MS = {reload_ms}"), encoding="utf-8", newline="")
    return path


@pytest.fixture
def path(tmp_path):
    """The page of a run that is over: each test has its own, as a tab keeps a page's state."""
    said = replace(HISTORY, recital=("the prompt", "its own words", "a verdict"))
    return write(tmp_path / "memory.html", said)


def opened(browser, path, width=1280, **how):
    """The page is there, and shows the text."""
    browser.open(path, width, **how)
    browser.ask("ready")
    return browser


def told(browser):
    """The row's step, as figures and a screen reader tell it; both must agree."""
    step, share, said = browser.ask("[$('step').textContent, $('share').textContent, time.ariaValueText]")
    said = said or browser.ask("time.getAttribute('aria-valuetext')")
    assert said == f"step {step} of {STEPS[-1]}: {share} of the tokens known"
    return int(step)


def test_the_text_is_shown_in_its_shades(browser, path):
    """Reference: the text, and the scale's shade of each level, at every tenth row."""
    opened(browser, path)
    assert browser.ask("text.textContent") == TEXT
    assert browser.ask("document.querySelectorAll('*').length") < MOST_ELEMENTS
    for row in (*range(0, len(STEPS), 10), len(STEPS) - 1):
        browser.ask(f"halt({row})")
        assert told(browser) == STEPS[row]
        assert browser.ask(SHADES) == shade_of_level()[HISTORY.levels[row]].tolist()


def test_awkward_texts_are_shown_as_they_are(browser, tmp_path):
    """Reference: the text, but for NUL, which is shown as its picture; a character of several tokens is one element."""
    tokens = bytes_of(AWKWARD)
    history, _ = memory(tokens, rows=5, last=365)
    opened(browser, write(tmp_path / "memory.html", history, tokens))
    assert browser.ask("text.textContent") == AWKWARD.replace("\0", "␀")
    words = browser.ask("spans.map(span => span.textContent)")
    assert "\ufffd" not in "".join(words)
    assert len(words) < len(tokens)
    browser.ask("void (() => { for (let i = 0; i < spans.length; i++) choose(i); })()")


def test_the_slider_goes_from_row_to_row(browser, path):
    """Reference: the history's steps. The address names the step, but for the newest."""
    opened(browser, path)
    browser.ask("time.focus()")
    assert told(browser) == STEPS[-1]
    for key, row in (("Home", 0), ("ArrowRight", 1), ("ArrowUp", 2), ("ArrowLeft", 1), ("ArrowDown", 0), ("End", -1)):
        browser.press(key)
        assert told(browser) == STEPS[row], key
    browser.press("ArrowLeft")
    browser.ask("new Promise(done => setTimeout(done, 500))")
    assert browser.ask("location.hash") == f"#step={STEPS[-2]}"
    browser.open(path.parent / "memory.html", 800)  # the same tab goes on where it was
    browser.ask("ready")
    assert told(browser) == STEPS[-2]
    browser.ask("void (location.hash = 'step=101')")
    browser.ask("new Promise(done => setTimeout(done, 100))")
    assert told(browser) == 100


def test_space_plays_and_pauses(browser, path):
    """Invariant: from the beginning, forwards, and only where no button has the focus, which space presses."""
    opened(browser, path)
    browser.press(" ")
    assert browser.ask("$('play').textContent") == "Pause"
    browser.ask("new Promise(done => { const look = () => row > 2 ? done() : setTimeout(look, 20); look(); })")
    browser.press(" ")
    assert browser.ask("$('play').textContent") == "Play"
    step = told(browser)
    assert STEPS[2] < step < STEPS[-1]
    browser.ask("new Promise(done => setTimeout(done, 600))")
    assert told(browser) == step
    browser.ask("$('mode').focus()")
    browser.press(" ")
    assert browser.ask("[playing, $('mode').ariaPressed]") == [0, "true"]
    browser.ask("halt(rows - 3)")
    browser.ask("$('play').focus()")
    browser.press(" ")
    browser.ask("new Promise(done => { const look = () => playing ? setTimeout(look, 20) : done(); look(); })")
    assert told(browser) == STEPS[-1], "it stops at the end"


def test_when_each_token_was_learnt(browser, path):
    """Reference: TokenHistory.learnt_at(); at an earlier step what was learnt later is not yet."""
    opened(browser, path)
    browser.ask("$('mode').click()")
    learnt = HISTORY.learnt_at()
    for row in (len(STEPS) - 1, len(STEPS) // 2):
        browser.ask(f"halt({row})")
        shades = np.array(browser.ask(SHADES))
        expected = np.floor(15 * (1 - learnt / STEPS[-1]) + 0.5)
        assert shades.tolist() == np.where((learnt < 0) | (learnt > STEPS[row]), NO_SHADE, expected).tolist()


def test_a_token_tells_how_it_was_learnt(browser, path):
    """Reference: the history, by keyboard and by pointer; a screen reader is told what the card shows."""
    opened(browser, path)
    row, learnt = 40, HISTORY.learnt_at().tolist()
    browser.ask(f"halt({row}), text.focus()")
    browser.press("ArrowRight")
    assert (
        browser.ask("$('told').textContent")
        == "First; token 1 of 2,048; not shown: nothing in the text comes before it"
    )
    for token in range(1, 12):
        browser.press("ArrowRight")
        card, level = browser.ask("$('told').textContent"), int(HISTORY.levels[row, token])
        assert level != UNSEEN
        assert f"token {token + 1} of 2,048; loss {level * 0.05:.2f}, probability " in card
        assert card.endswith(f"; known for good from step {learnt[token]}")
    browser.press("Escape")
    assert browser.ask("card.className") == "empty"
    box = browser.ask("(b => [b.left + b.width / 2, b.top + b.height / 2])(spans[30].getClientRects()[0])")
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert browser.ask("card.textContent").startswith(TOKENS[30].decode().strip("\n"))
    assert browser.ask("spans[30].matches('.at')")


def test_a_page_of_a_run_that_goes_on_loads_itself_again(browser, tmp_path):
    """Invariant: it does so by itself until the run is over."""
    path = write(tmp_path / "memory.html", HISTORY.until(180), is_running=True, reload_ms=500)
    opened(browser, path)
    write(path)
    browser.events.clear()
    browser.wait_for_load()
    assert browser.ask("ready.then(() => [data.running, steps[row]])") == [False, STEPS[-1]]
    browser.ask("void (window.old = true)")
    browser.ask("new Promise(done => setTimeout(done, 1200))")
    assert browser.ask("window.old") is True


def test_a_run_that_was_killed_is_not_waited_for(browser, tmp_path):
    """Invariant: a page that was written more than ten minutes ago says so, and does not load itself again."""
    path = write(tmp_path / "memory.html", HISTORY.until(180), is_running=True, reload_ms=200)
    path.write_text(re.sub(r'"written_ms":\d+', f'"written_ms":{1000 * (int(time.time()) - 1200)}', path.read_text()))
    opened(browser, path)
    assert browser.ask("ready.then(() => document.getElementById('about').textContent)") == (
        "last written 20 minutes ago: the run may have ended"
    )
    browser.ask("void (window.old = true)")
    browser.ask("new Promise(done => setTimeout(done, 1000))")
    assert browser.ask("window.old") is True


def test_a_page_that_loads_itself_again_goes_on_where_it_was(browser, tmp_path):
    """Invariant: it follows the newest step, keeps every other, and waits for a person who plays or points."""
    path = write(tmp_path / "memory.html", HISTORY.until(180), is_running=True)
    opened(browser, path, 800)

    def renewed(rows):
        write(path, HISTORY.until(rows), is_running=True)
        browser.events.clear()
        browser.ask("void setTimeout(renew, 100)")
        browser.wait_for_load()
        browser.ask("ready")

    assert browser.ask("[steps[row], $('of').textContent]") == [180, "step of 180 so far"]
    renewed(250)
    assert browser.ask("steps[row]") == 250
    browser.ask("time.focus(), halt(nearest(100)), scrollTo(0, 300)")
    renewed(300)
    assert browser.ask("[steps[row], steps[rows - 1], scrollY, document.activeElement.id]") == [100, 300, 300, "time"]
    browser.ask("void ($('mode').click(), window.old = true)")
    for busy, idle in (("play()", "stop()"), ("choose(3)", "forget()"), ("dragging = true", "dragging = false")):
        browser.ask(f"void ({busy}, renew())")
        browser.ask("new Promise(done => setTimeout(done, 300))")
        assert browser.ask("window.old") is True, busy
        browser.ask(f"void ({idle})")
    renewed(350)
    assert browser.ask("[window.old, byStep]") == [None, True]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 800, 1280, 1600])
def test_it_fits_and_can_be_read(browser, path, width, dark):
    """Invariant: no horizontal scrolling, and a contrast of 4.5 in every state."""
    opened(browser, path, width, dark=dark)
    browser.ask("document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important }</style>')")
    for click in ("", "$('mode').click()"):
        browser.ask(f"void {click or 0}")
        for row in (0, 1, len(STEPS) // 2, len(STEPS) - 1):
            browser.ask(f"halt({row}), choose(20)")
            assert browser.ask("document.documentElement.scrollWidth") <= width
            assert browser.ask(PALE) == []
    assert browser.ask("[...document.querySelectorAll('#recital .words span')].map(e => e.textContent)") == [
        "the prompt", "its own words",
    ]  # fmt: skip
    inks = browser.ask("[...document.querySelectorAll('#recital .words span')].map(e => getComputedStyle(e).color)")
    assert inks[0] != inks[1]


def test_the_player_and_the_card_hide_nothing(browser, path):
    """Invariant: where they lie over the text, the recital and a token that the keyboard leads to are clear of them."""
    opened(browser, path, 390)
    browser.ask("document.querySelector('.buttons a').click()")
    head = "document.querySelector('.player').getBoundingClientRect().bottom"
    assert browser.ask(f"[scrollY > 0, $('recital').getBoundingClientRect().top >= {head}]") == [True, True]
    browser.ask("text.focus(), choose(600), walk(1)")
    token, card = "spans[601].getBoundingClientRect()", "card.getBoundingClientRect()"
    assert browser.ask(f"[{token}.top >= {head}, {token}.bottom <= {card}.top]") == [True, True]


def test_who_wants_no_motion_gets_none(browser, path):
    """Reference: prefers-reduced-motion."""
    opened(browser, path)
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    browser.ask("new Promise(requestAnimationFrame)")
    browser.ask("text.classList.add('slow', 'moved')")
    assert browser.ask("[text, spans[3]].map(e => getComputedStyle(e).transitionProperty)") == ["none", "none"]


def test_a_browser_that_cannot_unpack_says_so(browser, path):
    """Invariant: one line instead of the text."""
    script = browser("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    opened(browser, path)
    browser("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])
    assert browser.ask("[$('trouble').checkVisibility(), text.checkVisibility()]") == [True, False]
    assert re.fullmatch("The text cannot be shown: .*[.]", browser.ask("$('trouble').textContent"))


def test_a_long_text_stays_quick(browser, tmp_path):
    """Invariant: few elements, a move of the slider within half a second, and the sections together are the text."""
    tokens = (TOKENS * 150)[:300_000]
    history, _ = memory(tokens, rows=55, last=365)
    opened(browser, write(tmp_path / "memory.html", history, tokens))
    assert browser.ask("document.querySelectorAll('*').length") < MOST_ELEMENTS
    took_ms = browser.ask("""(async () => {
      const took = [];
      for (let r = 0; r < rows; r += 5) {
        const start = performance.now();
        halt(r);
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));  // it is painted
        took.push(performance.now() - start);
      }
      return took;
    })()""")
    assert sorted(took_ms)[len(took_ms) // 2] < 500, took_ms
    count = browser.ask("sections.length - 1")
    shown = []
    for section in range(count):
        shown.append(browser.ask(f"show({section}), text.textContent"))
    assert "".join(shown) == b"".join(tokens).decode()
    assert browser.ask("document.querySelectorAll('*').length") < MOST_ELEMENTS
    browser.ask("show(0), place.focus()")
    browser.press("ArrowRight")
    assert browser.ask("place.getAttribute('aria-valuetext')").startswith(f"section 2 of {count}: tokens ")
    assert browser.ask("text.textContent") == shown[1]
    right, middle = browser.ask("(b => [b.right - 1, b.top + b.height / 2])(map.getBoundingClientRect())")
    browser.ask(f"map.dispatchEvent(new MouseEvent('click', {{ clientX: {right}, clientY: {middle} }}))")
    assert browser.ask("section / (sections.length - 1)") == pytest.approx(0.5, abs=0.05)
