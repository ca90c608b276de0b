"""One section of on_gpu.py, measured in a process of its own and written as JSON after each figure.

python benchmarks/on_gpu_worker.py --section=steps --out=steps.json
python benchmarks/on_gpu_worker.py --section=steps --out=steps.json --rehearse=true      # tiny models
"""

import gc
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Literal
from xml.etree import ElementTree

import torch
from parts import REPOSITORY
from parts.options import CheckedOptions, as_words, run_script
from parts.runs import all_reduces, train, train_in
from parts.step import CollectingWorld, TrainStep

from nanogpt.config.errors import one_line
from nanogpt.config.options import option
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.buckets import CHUNK_BYTES
from nanogpt.distributed.hardware import table_peak
from nanogpt.distributed.world import World
from nanogpt.engine.cuda_graph import Replay
from nanogpt.evaluate.recall import Forward, full_pass, read
from nanogpt.model.gpt import GPT, GPTConfig, flops_per_token
from nanogpt.plan.plan import make_plan
from nanogpt.storage.json_file import write_json

NO_GRAPHS = "needs CUDA"
SHORT_TEXT = {"subset_tokens": 129, "log_every": 1}  # scoring it at the end takes less time than the steps


@dataclass(frozen=True)
class Scale:
    """How large what is measured is, and how often it is."""

    options: dict[str, Any]  # of each run
    context_length: int
    long: tuple[int, int]  # windows and tokens of a step that keeps a GPU busy
    message_bytes: int  # of a collective
    warm_up: int  # steps, whose losses are kept
    repeats: int  # of a measurement
    in_a_row: int  # steps in one of them
    parts: tuple[int, ...]  # windows that a full pass takes at once
    most_steps: int  # of a run to the target


REAL = Scale({}, 64, (32, 1024), 8 * CHUNK_BYTES, 8, 5, 20, (4, 16, 64, 256), 1000)
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64}
TINY = Scale(SHAPE | {"subset_tokens": 130, "learning_rate": 3e-3}, 16, (2, 64), 2**16, 4, 2, 2, (4, 16), 30)


@dataclass(frozen=True)
class WorkerOptions(CheckedOptions):
    """What to measure."""

    section: str = option("steps", "a key of SECTIONS")
    out: str = option("section.json", "where the result goes")
    rehearse: Literal["true", "false"] = option("false", "true: tiny models")


@dataclass(frozen=True)
class Variant:
    """One way to make a step."""

    windows: int
    context_length: int
    recipe: str = "reference"  # AdamW; fast: Muon
    engine: str = "single"
    collectives: bool = False  # whether a world of one makes them all the same
    graphs: bool = True
    compiled: bool = False
    head_dtype: str = "auto"


Keep = Callable[[dict[str, Any]], None]  # writes what is known by now


def gpu_tests(_: World, __: Scale, keep: Keep) -> None:
    """tests/gpu, by what pytest says of each test."""
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory, "junit.xml")
        # Four at once: most of a test is the start of programs.
        words = ["-m", "pytest", "-m", "gpu", "-n", "4", "--dist=load", "tests/gpu", f"--junitxml={junit}"]
        status = subprocess.run([sys.executable, *words], cwd=REPOSITORY, check=False).returncode
        tests = [_told(case) for case in ElementTree.parse(junit).iter("testcase")]
        keep({"status": status, "tests": tests})


def _told(case: ElementTree.Element) -> dict[str, Any]:
    ends = [(kind, case.find(kind)) for kind in ("failure", "error", "skipped")]
    outcome, why = next(((kind, end) for kind, end in ends if end is not None), ("passed", None))
    message = "" if why is None else (why.get("message") or why.text or "")
    return {"name": case.get("name"), "outcome": outcome, "seconds": float(case.get("time", 0)), "why": message[:1000]}


def collectives(world: World, scale: Scale, keep: Keep) -> None:
    """Each collective of the engines, captured and replayed in a world of one; then the group is taken down."""
    found: dict[str, Any] = {"message_bytes": scale.message_bytes, "collectives": []}
    with world.process_group(even_alone=True):
        collecting = _collecting(world)
        sent = torch.randn(scale.message_bytes // 4, device=world.device)
        received = torch.zeros_like(sent)
        works: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: collecting.sum_tensor(received.copy_(sent)),
            "reduce_scatter": lambda: _wait(collecting.begin_reduce_scatter(sent, received)),
            "all_gather": lambda: _wait(collecting.begin_all_gather(sent, received)),
            "all_to_all": lambda: _wait(collecting.begin_all_to_all(sent, received)),
        }
        for name, work in works.items():
            captured: Any = work
            if world.device.type == "cuda":
                captured = Replay(work, world, torch.cuda.Stream(world.device))
            told: dict[str, Any] = {"name": name, "seconds": []}
            for _ in range(2 + scale.repeats):  # once as it is, once recorded
                received.zero_()
                told["seconds"].append(world.seconds_of(captured))
                told["right"] = told.get("right", True) and torch.equal(sent, received)
            told["captured"] = captured.is_graph if world.device.type == "cuda" else NO_GRAPHS
            found["collectives"].append(told)
            keep(found)
        del captured
        began = time.perf_counter()
    keep(found | {"teardown_s": time.perf_counter() - began})


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()


def _collecting(world: World) -> World:
    return CollectingWorld(world.rank, world.local_rank, world.size, world.device)


def steps(world: World, scale: Scale, keep: Keep) -> None:
    """A step of the default job, and of a smaller one, with each change on and off."""
    for_sizes = [Variant(windows, scale.context_length) for windows in (16, 2)]
    _measure_all([each for size in for_sizes for each in _changes(size)], world, scale, keep)


def _changes(size: Variant) -> Iterator[Variant]:
    """size with each change on and off."""
    for recipe in ("reference", "fast"):
        for graphs in (False, True):
            for engine, collecting in (("single", False), ("sharded", False), ("sharded", True)):
                yield replace(size, recipe=recipe, graphs=graphs, engine=engine, collectives=collecting)


def compiled_steps(world: World, scale: Scale, keep: Keep) -> None:
    """The same, compiled: single, sharded, the smaller one, and with Muon."""
    default = Variant(16, scale.context_length, graphs=world.device.type == "cuda", compiled=True)
    others = ({"engine": "sharded", "collectives": True}, {"windows": 2}, {"recipe": "fast"})
    _measure_all([default, *(replace(default, **other) for other in others)], world, scale, keep)


def long_steps(world: World, scale: Scale, keep: Keep) -> None:
    """A step that keeps the device busy, eager."""
    plain = Variant(*scale.long, graphs=False)
    graphs = replace(plain, graphs=world.device.type == "cuda")
    _measure_all([plain, graphs, replace(graphs, head_dtype="fp8")], world, scale, keep)


def long_compiled(world: World, scale: Scale, keep: Keep) -> None:
    """The same, compiled."""
    graphs = world.device.type == "cuda"
    variants = [Variant(*scale.long, graphs=graphs, compiled=True, head_dtype=head) for head in ("auto", "fp8")]
    _measure_all(variants, world, scale, keep)


def _measure_all(variants: list[Variant], world: World, scale: Scale, keep: Keep) -> None:
    """Every variant; one that fails is written down, and the next one's turn comes."""
    rows: list[dict[str, Any]] = []
    with world.process_group(even_alone=True):
        model = GPT(GPTConfig.from_options(TrainConfig(**scale.options)))  # drawing it takes seconds
        for variant in variants:
            print(variant, flush=True)
            try:
                told = _measure(variant, deepcopy(model), world, scale)
            except Exception as error:
                traceback.print_exc()
                told = {"failure": f"{type(error).__name__}: {one_line(error)}"}
            rows.append(asdict(variant) | told)
            keep({"steps": rows})
            gc.collect()
            torch._dynamo.reset()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()


def _measure(variant: Variant, model: GPT, world: World, scale: Scale) -> dict[str, Any]:
    """Steps that the host waits for, each alone, and steps in a row, as a run takes them."""
    cuda = world.device.type == "cuda"
    if variant.graphs and not cuda:
        return {"failure": NO_GRAPHS}
    own = {"batch_size": variant.windows, "context_length": variant.context_length, "recipe": variant.recipe}
    own["head_dtype"] = variant.head_dtype
    plan = make_plan(TrainConfig(**scale.options | own, engine=variant.engine), world)
    held_bytes = torch.cuda.memory_allocated() if cuda else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    used = _collecting(world) if variant.collectives else world
    step = TrainStep(plan, used, model=model, compiled=variant.compiled, graphs=variant.graphs)
    numbers = count()

    def train_on() -> float:
        loss = step(next(numbers), plan.config.learning_rate)
        step.average.update()
        return loss

    losses = [train_on() for _ in range(scale.warm_up)]
    world.wait_for_device()
    ready_s = time.perf_counter() - began
    alone = [world.seconds_of(train_on) for _ in range(scale.repeats * 2)]
    rows = [
        world.seconds_of(lambda: [train_on() for _ in range(scale.in_a_row)]) / scale.in_a_row
        for _ in range(scale.repeats)
    ]
    flops = flops_per_token(GPTConfig.from_options(plan.config), context_length=variant.context_length)
    peak = table_peak(world.device_name(), plan.config.dtype)
    told = {
        "dtype": plan.config.dtype, "cuda_graphs": step.engine.cuda_graphs, "ready_s": ready_s, "losses": losses,
        "alone_s": alone, "in_a_row_s": rows,
        "mfu": flops * variant.windows * variant.context_length / median(rows) / peak if peak else None,
        "held_before_bytes": held_bytes,
        "allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "compile_s": step.engine.compilation.seconds, "not_compiled": step.engine.compilation.failure,
    }  # fmt: skip
    step.engine.close()
    return told


def full_passes(world: World, scale: Scale, keep: Keep) -> None:
    """A full pass by the windows that it takes at once: of training, and of the scores in fp32."""
    plan = make_plan(TrainConfig(**scale.options, context_length=scale.context_length), world)
    dataset, found = plan.dataset, []
    with world.process_group():
        model, windows = GPT(GPTConfig.from_options(plan.config)).to(world.device), dataset.windows.on(world.device)
        for rows in scale.parts:
            told: dict[str, Any] = {"rows": rows, "windows": len(dataset.judged), "dtype": plan.config.dtype}
            for name, work in (
                ("full_pass_s", lambda f: full_pass(model, windows, dataset.judged, f)),
                ("scores_s", lambda f: read(model, windows, dataset.judged, replace(f, dtype="fp32"))),
            ):
                forward = Forward(world, plan.config.dtype, rows)
                told[name] = [world.seconds_of(lambda f=forward, w=work: w(f)) for _ in range(1 + scale.repeats)]
            told["memory_bytes"] = world.peak_memory_bytes()
            found.append(told)
            keep({"plan_rows": plan.evaluation_rows, "passes": found})


def default_run(world: World, scale: Scale, keep: Keep) -> None:
    """The default run to its verified target."""
    _run_to_target("reference", scale, keep)


def fast_run(world: World, scale: Scale, keep: Keep) -> None:
    """The same by the fast recipe."""
    _run_to_target("fast", scale, keep)


def _run_to_target(recipe: str, scale: Scale, keep: Keep) -> None:
    """A run, with the seconds of each phase from row to row of its metrics.jsonl."""
    words = as_words(scale.options | {"max_steps": scale.most_steps, "recipe": recipe})
    with tempfile.TemporaryDirectory() as directory:
        run = train_in(Path(directory, "out"), *words)
    told = ("reached", "steps", "loss", "launch_s", "train_s", "full_pass_s", "scores_s", "cuda_graphs", "compiled")
    rows, before_s = [], 0.0
    for row in run.rows:
        seconds = row["wall_s"] - before_s
        phases_s = {name: (share or 0.0) * seconds for name, share in row["time_share"].items()}
        phases_s["rest"] = seconds - sum(phases_s.values())
        rows.append(
            {name: row[name] for name in ("step", "wall_s", "step_s", "full_pass_loss")} | {"phases_s": phases_s}
        )
        before_s = row["wall_s"]
    recall = run.report.get("recall") or {}
    keep(
        {key: run.report.get(key) for key in told}
        | run.circumstances()
        | {"exact_recall": recall.get("exact_recall"), "rows": rows}
    )


def ranks_parity(world: World, scale: Scale, keep: Keep) -> None:
    """Losses and norms of fp32 steps: one rank, and all of them with both engines."""
    short = {"context_length": scale.context_length, "dtype": "fp32", "compile": "false", "max_steps": 20}
    words = as_words(scale.options | SHORT_TEXT | short)
    found: dict[str, Any] = {"ranks": ranks_here(world)[-1], "curves": {}}
    for name, ranks in (("single", 1), ("ddp", found["ranks"]), ("sharded", found["ranks"])):
        run = train(*words, f"--engine={name}", ranks=ranks)
        found["curves"][name] = [[row["loss"], row["grad_norm"]] for row in run.rows]
        keep(found)


def ranks_all_reduce(world: World, scale: Scale, keep: Keep) -> None:
    """All-reduces of several sizes."""
    found: dict[str, Any] = {"all_reduce_s": {}}
    for ranks in ranks_here(world):
        found["all_reduce_s"][str(ranks)] = all_reduces(ranks, scale.repeats * 4)
        keep(found)


def ranks_steps(world: World, scale: Scale, keep: Keep) -> None:
    """Steps of the default job by the number of ranks, with both engines."""
    own = {"context_length": scale.context_length, "max_steps": 12 * scale.repeats}
    words = as_words(scale.options | SHORT_TEXT | own)
    rows: list[dict[str, Any]] = []
    for engine, ranks in [("single", 1), *((name, n) for n in ranks_here(world) for name in ("ddp", "sharded"))]:
        run = train(*words, f"--engine={engine}", ranks=ranks)
        settled = run.rows[len(run.rows) // 3 :]
        rows.append({
            "engine": engine, "ranks": ranks, "step_s": [row["step_s"] for row in settled],
            "memory_bytes": run.report["peak_memory_bytes"], "cuda_graphs": run.report["cuda_graphs"],
        })  # fmt: skip
        keep({"steps": rows})


def ranks_here(world: World) -> list[int]:
    """The numbers of several ranks that this machine has GPUs for; without any, two that share the CPU."""
    if world.device.type != "cuda":
        return [2]
    gpus = torch.cuda.device_count()
    return sorted({n for n in (2, 4, gpus) if 2 <= n <= gpus})


SECTIONS = {
    section.__name__: section
    for section in (
        gpu_tests, collectives, steps, default_run, fast_run, full_passes, long_steps, compiled_steps, long_compiled,
        ranks_parity, ranks_all_reduce, ranks_steps,
    )
}  # fmt: skip


def work(options: WorkerOptions) -> int:
    """Measure the section."""
    scale = TINY if options.rehearse == "true" else REAL
    SECTIONS[options.section](World.from_env(), scale, lambda found: write_json(Path(options.out), found))
    return 0


if __name__ == "__main__":
    run_script(__file__, __doc__, WorkerOptions, work)
