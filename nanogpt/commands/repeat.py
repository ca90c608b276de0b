"""Time to target over many seeds, as MLPerf counts it: a run a seed, the fastest and the slowest dropped.

python -m nanogpt repeat --seeds=10 --out_dir=runs/repeat --max_minutes=60

Each run is a process of its own in out_dir/seed_N, its terminal output in output.txt there. The same command goes on
where it was stopped. A run that did not reach the target took infinitely long: it may be the slowest that is dropped,
and where another one is left there is no mean.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from math import inf, isfinite, pi, sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from types import FrameType
from typing import Any, ClassVar

import numpy as np

from nanogpt.config.errors import ConfigError
from nanogpt.config.files import regular, user_path
from nanogpt.config.options import option
from nanogpt.config.train_config import TrainConfig
from nanogpt.storage.json_file import find_json, write_json
from nanogpt.storage.provenance import Provenance, RunInfo
from nanogpt.storage.report import Report, exit_reason
from nanogpt.utils.console import outlive_output, say
from nanogpt.utils.signals import SIGNALS, signals_to_heed

RESULT, TABLE, OUTPUT = "repeat.json", "repeat.md", "output.txt"
TRIMMED_FROM = 5  # runs; of fewer nothing is dropped
LEVEL = 0.95  # of the interval
OWN = {"seed", "seeds", "out_dir"}  # options that tell the runs apart, or are not theirs
MEASURED = ("steps", "train_s", "launch_s")
ALIKE = ("corpus_sha256", "device", "dtype", "world_size", "git_commit", "versions")  # else the runs are no one sample


@dataclass(frozen=True)
class RepeatOptions(TrainConfig):
    """What `repeat` is asked: the options of train_overfit.py, each run's alike but for the seed."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {  # where its runs are is its own
        name: {option: value for option, value in values.items() if option != "out_dir"}
        for name, values in TrainConfig.presets.items()
    }
    out_dir: str = option(
        "runs/repeat", "holds a run directory for each seed, repeat.json and repeat.md", group="Output"
    )
    seeds: int = option(10, "how many runs, of the seeds --seed, --seed + 1 and so on", "runs", group="Repeat")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume != "auto":
            raise ConfigError(f"--resume={self.resume}: repeat resumes by itself: leave it out")


def repeat(options: RepeatOptions) -> int:
    """Measure time to target over several seeds; status 0: every run reached it, 3: one did not, 4: asked to stop."""
    outlive_output()
    if os.environ.get("WORLD_SIZE", "1") != "1" or "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError("repeat starts its runs itself, each one process: leave torchrun out")
    out_dir = user_path(options.out_dir, f"--out_dir={options.out_dir}")
    asked = {
        f.name: value
        for f in fields(TrainConfig)
        if f.name not in OWN and (value := getattr(options, f.name)) != f.default
    }
    _check_same(out_dir, asked)
    runs: list[dict[str, Any]] = []
    for seed in range(options.seed, options.seed + options.seeds):
        directory = out_dir / f"seed_{seed}"
        if not _is_finished(directory):
            say(f"seed {seed}: running, its output in {directory / OUTPUT}")
            words = [f"--{name}={value}" for name, value in (asked | {"seed": seed, "out_dir": directory}).items()]
            status, signalled = _train(words, out_dir, directory, {"options": asked, "runs": runs})
            # A run that has nothing to save yet dies of a signal that asks it to stop.
            if signalled or ((status == 4 or -status in SIGNALS) and not _is_finished(directory)):
                say(f"asked to stop at seed {seed}: the same command goes on")
                return 4
            runs.append(_outcome(seed, directory, status))
        else:
            runs.append(_outcome(seed, directory, 0))
        say(_line(runs[-1]))
        result = {"options": asked, "runs": runs, **_statistics(runs)}
        write_json(out_dir / RESULT, result)
        (out_dir / TABLE).write_text(table(result) + "\n", encoding="utf-8")
    say(table(result))
    return 0 if all(run["reached"] for run in runs) else 3


def summarise(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """One figure of all runs: mean without the extremes, its 95 % interval, median; None where it is infinite.

    values: a figure for each run, None where the target was not reached, which is slower than any. The interval is
    that of a trimmed mean: Student's t with the winsorised standard deviation (Tukey and McLaughlin, 1963), as the kept
    values alone, of which the extremes have been taken, would make it too narrow.
    """
    ordered = sorted(inf if value is None else float(value) for value in values)
    count = len(ordered)
    drop = int(count >= TRIMMED_FROM)
    kept = ordered[drop : count - drop]
    mean = fmean(kept)
    found: dict[str, float | None] = {
        "kept": len(kept), "mean": mean, "low": None, "high": None, "median": median(ordered)
    }  # fmt: skip
    if len(kept) > 1 and isfinite(kept[-1]):
        winsorised = [kept[0]] * drop + kept + [kept[-1]] * drop
        error = stdev(winsorised) / ((1 - 2 * drop / count) * sqrt(count))
        half = t_quantile(len(kept) - 1) * error
        found |= {"low": mean - half, "high": mean + half}
    return {name: value if value is not None and isfinite(value) else None for name, value in found.items()}


def t_quantile(degrees: int) -> float:
    """The t that Student's distribution is within, either side of 0, with probability LEVEL.

    With t = sqrt(degrees) tan(a) its density is cos(a)^(degrees - 1), which a sum over a finite range integrates.
    """
    a = np.linspace(0, pi / 2, 200_001)
    density = np.cos(a) ** (degrees - 1)
    within = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return sqrt(degrees) * float(np.tan(np.interp(LEVEL * within[-1], within, a)))


def table(result: dict[str, Any]) -> str:
    """repeat.json in Markdown."""
    runs, reached = result["runs"], result["reached"]
    words = " ".join(f"--{name}={value}" for name, value in result["options"].items()) or "the defaults"
    lines = [
        f"{reached} of {len(runs)} runs reached the target ({words})",
        "",
        "| seed | outcome | loss, nats/token | steps | training, s | launch to target, s |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        figures = [
            _figure(run["loss"], 4),
            _figure(run["steps"]),
            _figure(run["train_s"], 1),
            _figure(run["launch_s"], 1),
        ]
        outcome = run["exit_reason"].replace("_", " ") + ", resumed" * run.get("resumed", False)
        lines.append(f"| {run['seed']} | {outcome} | {' | '.join(figures)} |")
    for name, low_or_high in (("mean", "mean"), ("95 % interval, from", "low"), ("to", "high"), ("median", "median")):
        figures = [_figure(result[figure][low_or_high], 1) for figure in MEASURED]
        lines.append(f"| {name} | | | {' | '.join(figures)} |")
    kept = result["steps"]["kept"]
    failed = len(runs) - reached
    dropped = (
        f"each mean is of {kept} runs, without the fastest and the slowest"
        if kept < len(runs)
        else f"fewer than {TRIMMED_FROM} runs: none is dropped"
    )
    lines += ["", dropped + (f"; {failed} did not reach the target and count as slower than any" if failed else "")]
    if any(run.get("resumed") for run in runs):
        lines.append("resumed: the run was stopped or killed, then resumed; the time lost is on none of its clocks")
    if result["differing"]:
        lines.append(f"warning: the runs differ in {', '.join(result['differing'])}: they are not one sample")
    return "\n".join(lines)


def _statistics(runs: list[dict[str, Any]]) -> dict[str, Any]:
    done = [run for run in runs if "device" in run]
    return {
        "reached": sum(run["reached"] for run in runs),
        "failed": sum(not run["reached"] for run in runs),
        "differing": [name for name in ALIKE if any(run[name] != done[0][name] for run in done)],
    } | {name: summarise([run[name] if run["reached"] else None for run in runs]) for name in MEASURED}


def _check_same(out_dir: Path, asked: dict[str, Any]) -> None:
    """Raise ConfigError where out_dir holds something else than runs with the options asked."""
    if (result := find_json(out_dir / RESULT)) is not None:
        before = result.get("options", {})
        differing = [f"--{name}" for name in {**before, **asked} if before.get(name) != asked.get(name)]
        if differing:
            raise ConfigError(f"{out_dir} holds runs with another {', '.join(differing)}: name another --out_dir")
    elif any(out_dir.glob("seed_*")):
        raise ConfigError(f"{out_dir} holds runs but no {RESULT}: name another --out_dir")


def _is_finished(directory: Path) -> bool:
    return exit_reason(directory / "report.json") not in (None, "stopped")


def _train(words: list[str], out_dir: Path, directory: Path, so_far: dict[str, Any]) -> tuple[int, bool]:
    """Run the program to its end -> (its status, whether a signal came meanwhile, which it was passed)."""
    begun = not os.path.exists(out_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        output = open(directory / OUTPUT, "ab", opener=regular)  # noqa: SIM115, closed below
        said_before = output.tell()
    except OSError as error:
        raise ConfigError(f"--out_dir={out_dir} cannot be written: {error.strerror or error}") from None
    if not (out_dir / RESULT).exists():
        write_json(out_dir / RESULT, so_far)
    children: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in signals_to_heed()}
    try:
        with output:
            # A session of its own: a terminal's Ctrl-C comes through this process alone, and once.
            child = subprocess.Popen(
                [sys.executable, "-m", "nanogpt", "train", *words], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            for number in signals:
                child.send_signal(number)
            children.append(child)
            status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == 2:  # the command line is wrong, or a run that an earlier repeat has left is still going on
        said = (directory / OUTPUT).read_bytes()[said_before:].decode(errors="replace").splitlines()
        if not (directory / "config.json").exists():
            (directory / OUTPUT).unlink()
            with suppress(OSError):
                directory.rmdir()
                if begun:
                    (out_dir / RESULT).unlink()
                    out_dir.rmdir()
        errors = (
            [line for line in said if line.startswith("error: ")]
            or said
            or ["a run ended with status 2 and printed nothing"]
        )
        raise ConfigError(errors[-1].removeprefix("error: "))
    return status, bool(signals)


def _outcome(seed: int, directory: Path, status: int) -> dict[str, Any]:
    """What a run came to."""
    if not _is_finished(directory):
        nothing = dict.fromkeys(("loss", *MEASURED))
        return {"seed": seed, "reached": False, "exit_reason": f"died with status {status}", **nothing}
    report = Report.read(directory / "report.json", of="a run")
    info = RunInfo.read(directory / "config.json", of="a run")
    kept = {name: getattr(report, name) for name in ("reached", "exit_reason", "loss", *MEASURED)}
    kept |= {"resumed": info.resumed_from is not None}
    code = report.code or info.code
    of_code = {f.name for f in fields(Provenance)}
    alike = {name: getattr(code if name in of_code else report, name, None) for name in ALIKE}
    return {"seed": seed} | kept | alike


def _line(run: dict[str, Any]) -> str:
    loss, steps, seconds = _figure(run["loss"], 4), _figure(run["steps"]), _figure(run["train_s"], 1)
    return f"seed {run['seed']}: {run['exit_reason'].replace('_', ' ')}, loss {loss}, {steps} steps, {seconds} s"


def _figure(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
