"""Where the time of some steps goes: a trace of each rank for Perfetto, and a summary of one screen.

    phases.listen(profiler)
    with profiler.step(10):                 # in every rank
        with phases("forward and backward", step=10):
            ...
    profiler.close()

Open out_dir/profile/rank_00000.json.gz in https://ui.perfetto.dev, which runs in the browser.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from nanogpt.distributed.world import World
from nanogpt.monitor.loggers import Logger
from nanogpt.utils.phases import PhaseListener, Phases

PROFILE, SUMMARY = "profile", "summary.txt"
TOP = 11  # operators in the summary
WIDTH = 100  # columns of the summary


class NullProfiler(PhaseListener):
    """No step is recorded."""

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step's training. Every rank must call, and no rank's step may fail alone."""
        yield

    def close(self) -> None:
        """No step follows. Every rank must call."""


class Profiler(NullProfiler):
    """Records a range of steps on one rank.

    A step divides into its phases without a rest: each lasts until the next one, or to the end of the step. Patient
    phases, which not every step has, are none of them.
    """

    def __init__(self, steps: range, world: World, out_dir: Path, logger: Logger, phases: Phases) -> None:
        self._steps, self._world, self._logger, self._announce = steps, world, logger, phases
        self._directory = out_dir / PROFILE
        self._profile: profile | None = None  # while it records
        self._recorded: list[int] = []
        self._in_step = False
        self._phases: dict[str, None] = {}  # in order of appearance
        self._phase = ExitStack()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            self._profile = start(cuda=self._world.device.type == "cuda")
        self._recorded.append(number)
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            self._phase.close()
        if number + 1 not in self._steps:
            self._write()

    def enter(self, name: str, *, step: int | None, patient: bool) -> None:
        if self._in_step and not patient:
            self._phase.close()
            self._phase.enter_context(record_function(name))
            self._phases[name] = None

    def close(self) -> None:
        if self._profile is not None:
            self._write()
        elif not self._recorded:
            first, stop = self._steps.start, self._steps.stop
            self._logger.say(f"warning: no step of --profile_steps={first}:{stop} was trained: there is no profile")

    def _write(self) -> None:
        """End the recording, and write it. A rank that cannot says so through the first, and the run goes on."""
        with self._announce("writing the profile", patient=True):
            failure = self._write_trace()
            # All ranks meet here, where the watchdog is patient: in the next step it would not be.
            for rank, why in enumerate(self._world.gather(failure)):
                if why:
                    self._logger.say(f"warning: the profile of rank {rank} could not be written ({why}); going on")

    def _write_trace(self) -> str:
        """This rank's file, and the first one's summary -> '' or why there is none."""
        recording, self._profile = self._profile, None
        assert recording is not None, "no step was recorded"
        try:
            recording.stop()
            self._directory.mkdir(exist_ok=True)
            trace = self._directory / f"rank_{self._world.rank:05d}.json.gz"
            temporary = trace.with_name(f".{trace.name}")  # the ending says that it is to be compressed
            recording.export_chrome_trace(str(temporary))
            os.replace(temporary, trace)
            if self._world.is_first:
                text = summary(recording.key_averages(), list(self._phases), self._recorded)
                (self._directory / SUMMARY).write_text(text + "\n", encoding="utf-8")
                self._logger.say(text)
        except Exception as error:  # the disk's, or one of the profiler's own, which have no common base
            return f"{type(error).__name__}: {error}"
        return ""


def open_profiler(steps: range, world: World, out_dir: Path, logger: Logger, phases: Phases) -> NullProfiler:
    """The profiler of this rank, for steps counted from 1, which listens to phases."""
    if not steps:
        return NullProfiler()
    profiler = Profiler(steps, world, out_dir, logger, phases)
    phases.listen(profiler)
    return profiler


def summary(events: EventList, phases: list[str], steps: list[int]) -> str:
    """A profile's averages for a person: how the steps divide into phases, and into operators or a GPU's kernels."""
    phase_us = {event.key: event.cpu_time_total for event in events if event.device_type == DeviceType.CPU}
    step_us = sum(phase_us[phase] for phase in phases)
    shares = ", ".join(f"{phase} {phase_us[phase] / step_us:.1%}" for phase in phases)
    rows, what = by_own_time(events)
    total_us = sum(us for us, _ in rows)
    lines = [
        f"profile of steps {steps[0]} to {steps[-1]} on rank 0, {step_us / len(steps) / 1000:.2f} ms a step",
        shares,
        f"  share    ms/step  calls/step  {what}, by self time",
    ]
    for us, event in rows[:TOP]:
        row = f"{us / total_us:7.1%}  {us / len(steps) / 1000:9.2f}  {event.count / len(steps):10.1f}  {event.key}"
        lines.append(row)
    rest_us = sum(us for us, _ in rows[TOP:])
    lines.append(f"{rest_us / total_us:7.1%}  {rest_us / len(steps) / 1000:9.2f}  {'':10}  {len(rows[TOP:])} others")
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines)


def by_own_time(events: EventList) -> tuple[list[tuple[float, FunctionEventAvg]], str]:
    """(microseconds, what took them itself), the longest first, and what these are: operators, or a GPU's kernels."""
    rows, what = [(e.self_device_time_total, e) for e in events if e.device_type != DeviceType.CPU], "kernel"
    if not rows:  # the processor does the work itself
        rows, what = [(e.self_cpu_time_total, e) for e in events], "operator"
    return sorted((row for row in rows if not row[1].is_user_annotation), key=lambda row: -row[0]), what


def start(*, cuda: bool) -> profile:
    """A profile that records from now on."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it says on stderr that it starts and stops
    recording = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
    recording.start()
    return recording
