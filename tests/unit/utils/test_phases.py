"""What a run is doing is announced once, and clock, watchdog and profiler hear of it."""

import ast
import time

import pytest

from harness.runs import REPOSITORY
from nanogpt.distributed.watchdog import PATIENCE_S, Watchdog
from nanogpt.distributed.world import World
from nanogpt.monitor.meters import SHARE_OF, SHARES, PhaseClock
from nanogpt.utils.phases import PhaseListener, Phases


class Notes(PhaseListener):
    """Everything that is heard, in order."""

    def __init__(self):
        self.heard = []

    def enter(self, name, *, step, patient):
        self.heard.append((name, step, patient))

    def tick(self):
        self.heard.append("tick")

    def leave(self):
        self.heard.append("leave")


def test_every_listener_hears_of_a_phase_from_its_beginning():
    """Invariant: each enter has its leave, after an exception too, and a late listener hears no leave without enter."""
    early, late = Notes(), Notes()
    phases = Phases(early)

    def broken():
        with phases("the beginning", patient=True):
            phases.listen(late)
            with phases("update", 12):
                phases.tick()
                raise KeyError

    with pytest.raises(KeyError):
        broken()
    inner = [("update", 12, False), "tick", "leave"]
    assert early.heard == [("the beginning", None, True), *inner, "leave"]
    assert late.heard == inner


def test_the_clock_counts_each_second_once():
    """Reference: phases of known lengths; one inside another has its own seconds, and one of no share has none."""
    clock = PhaseClock()
    phases = Phases(clock)
    began = time.perf_counter()
    with phases("full pass or scores", 3):
        time.sleep(0.02)
        with phases("saving", 3, patient=True):
            time.sleep(0.04)
        with phases("full pass or scores", 3, patient=True):
            time.sleep(0.02)
    with phases("the end"):
        time.sleep(0.02)
    clock.steps += 1
    shares, step_s = clock.take()
    wall_s = time.perf_counter() - began
    assert set(shares) == set(SHARES)
    assert 0.04 <= shares["full_pass"] * wall_s < wall_s - 0.055
    assert 0.04 <= shares["checkpoint"] * wall_s < wall_s - 0.055
    assert (shares["data"], shares["compute"], step_s) == (0, 0, 0)
    assert set(clock.take()[0].values()) == {0.0}, "afresh"


def test_the_watchdog_stays_at_a_phase_until_the_next():
    """Invariant: what comes between phases is done in the place and with the patience of the last one entered."""
    watchdog = Watchdog(World.from_env(), None, timeout_s=10)
    phases = Phases(watchdog)
    places = [(watchdog._place, watchdog._limit_s)]
    with phases("scores", 7, patient=True):
        pass
    places.append((watchdog._place, watchdog._limit_s))
    moves, moved_at = watchdog._moves, watchdog._moved_at
    phases.tick()
    assert watchdog._moves == moves + 1
    assert watchdog._moved_at >= moved_at
    with phases("the end"):
        places.append((watchdog._place, watchdog._limit_s))
    assert places == [("the ranks' connecting", 10), ("step 7, scores", PATIENCE_S), ("the end", 10)]


def test_every_share_has_its_phases():
    """Invariant: what the training announces has a share of the clock, or is known to have none."""
    announced = {
        call.args[0].value
        for path in (REPOSITORY / "nanogpt" / "training").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func).lower().endswith("phases")
        if call.args and isinstance(call.args[0], ast.Constant)
    }
    assert announced == {*SHARE_OF, "the beginning", "the end", "token losses"}
    assert {*SHARE_OF.values(), "communication"} == set(SHARES), "the engine tells what of a step it was"
