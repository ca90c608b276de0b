"""All that only a machine with GPUs can tell, in one go: tests, collectives, steps, runs, and several ranks.

benchmarks/on_gpu.sh results_folder               # installs what is missing, then the line below
python benchmarks/on_gpu.py --out=results_folder/on_gpu.json
python benchmarks/on_gpu.py --table=results_folder/on_gpu.json

Each section is a process with a time-out of its own, in order of importance; one that fails is written down with its
last lines, and the rest goes on. All of them keep within --budget_s: one for which there is no time left is skipped.
Beside the result lies a log of what the sections said. --rehearse=true has tiny models, and needs no GPU.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from parts import REPOSITORY
from parts.gpu_tables import tables
from parts.options import BenchmarkOptions, run_benchmark

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import option
from nanogpt.distributed.world import World
from nanogpt.storage.json_file import find_json, to_json, write_json
from nanogpt.storage.provenance import installed_version, provenance

LAST_LINES = 30  # of a section that fails
PATIENCE_S = 10.0  # from being asked to end to being killed


@dataclass(frozen=True)
class Section:
    """A function of on_gpu_worker.py, and its time."""

    name: str
    least_s: int  # it is not begun with less
    most_s: int
    ranks: bool = False  # whether it needs several GPUs


SECTIONS = (
    Section("gpu_tests", 60, 150),
    Section("collectives", 30, 60),
    Section("steps", 60, 150),
    Section("default_run", 30, 60),
    Section("fast_run", 30, 60),
    Section("ranks_parity", 60, 150, ranks=True),
    Section("ranks_all_reduce", 30, 90, ranks=True),
    Section("ranks_steps", 60, 300, ranks=True),
    Section("full_passes", 30, 60),
    Section("long_steps", 30, 80),
    Section("compiled_steps", 60, 150),
    Section("long_compiled", 60, 180),
)


@dataclass(frozen=True)
class OnGpuOptions(BenchmarkOptions):
    """What to measure, or which result to print."""

    budget_s: float = option(520.0, "all sections end within this", "seconds")
    rehearse: Literal["true", "false"] = option("false", "true: tiny models, on whatever is there")


def measure(options: OnGpuOptions, out: Path) -> dict[str, Any]:
    """Every section there is time for."""
    world = World.from_env()
    gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
    if not gpus and options.rehearse == "false":
        raise ConfigError("there is no GPU here: --rehearse=true tries the program without one")
    began = time.monotonic()
    result: dict[str, Any] = circumstances(world, gpus) | {"options": asdict(options), "sections": {}}
    for section in SECTIONS:
        left_s = options.budget_s - (time.monotonic() - began)
        if why := skipped(section, gpus, left_s):
            told: dict[str, Any] = {"status": "skipped", "why": why}
        else:
            print(section.name, file=sys.stderr, flush=True)
            told = run_section(section, min(section.most_s, left_s), out.with_suffix(".log"), options.rehearse)
        result["sections"][section.name] = told
        result["seconds"] = time.monotonic() - began
        write_json(out, result)
    return result


def circumstances(world: World, gpus: int) -> dict[str, Any]:
    """What was measured on."""
    extra = {name: installed_version(name) for name in ("triton", "pytest")}
    return {
        "began": _now(),
        "device": world.device_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
        "driver": _nvidia_smi() if gpus else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "cores": os.cpu_count(),
        "code": to_json(provenance()) | {"more_versions": extra},
    }


def _nvidia_smi() -> list[str]:
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    try:
        words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []


def skipped(section: Section, gpus: int, left_s: float) -> str:
    """Why the section is not begun; '' where it is."""
    if section.ranks and gpus == 1:
        return "needs two GPUs"
    if left_s < section.least_s:
        return f"{left_s:.0f} s are left, it needs {section.least_s}"
    return ""


def run_section(section: Section, most_s: float, log: Path, rehearse: str) -> dict[str, Any]:
    """Its status and times, and what it wrote until it ended or had to end."""
    with tempfile.TemporaryDirectory() as directory, log.open("ab") as lines:
        out = Path(directory, "section.json")
        worker = REPOSITORY / "benchmarks" / "on_gpu_worker.py"
        words = [f"--section={section.name}", f"--out={out}", f"--rehearse={rehearse}"]
        lines.write(f"\n== {section.name}, {_now()}\n".encode())
        lines.flush()
        start = lines.tell()
        began, began_at = time.monotonic(), _now()
        process = subprocess.Popen(
            [sys.executable, worker, *words], stdin=subprocess.DEVNULL, stdout=lines, stderr=lines,
            env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
        )  # fmt: skip
        try:
            status = "done" if process.wait(most_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = f"timed out after {most_s:.0f} s"
        finally:
            _end(process)
        told: dict[str, Any] = {"status": status, "began": began_at, "seconds": time.monotonic() - began}
        if status != "done":
            told["last_lines"] = log.read_bytes()[start:].decode(errors="replace").splitlines()[-LAST_LINES:]
        return told | {"result": find_json(out)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it has started; torchrun, when it is asked to, ends its ranks."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            process.poll()
            os.killpg(process.pid, 0)  # is anybody left?
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    return "\n\n".join(tables(result))


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, OnGpuOptions, measure, table)
