"""acceptance.html in a browser: opened as a file, at three widths, in light and dark, with the keyboard alone."""

import re

import pytest

from harness.chromium import PALE, started
from nanogpt.acceptance.page import Page, StageRow, make_page
from nanogpt.acceptance.verdict import Check, PerRank, Verdict
from nanogpt.plots.band_chart import Curve

WIDTHS = (390, 800, 1600)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One for all tests; skips where there is none."""
    with started(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


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
