"""The time of a training step: ours beside what a user would take instead, and beside the machine's own limits.

python benchmarks/step_time.py
python benchmarks/step_time.py --table=benchmarks/results/step_time.zen5.2026-11-29.json

The first trains and writes JSON, the second prints it as a Markdown table. Each contender is a process of its own, with
the same text, windows and shape of model; they take turns of a few steps, the others standing still, so that a machine
that drifts disturbs all alike. In each round the machine's limits are measured too: one process multiplies matrices of
the model's shapes, in both dtypes, and copies memory. On a GPU ours runs compiled too.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from parts.contenders import contenders_here
from parts.options import BenchmarkOptions, as_words, run_benchmark
from parts.turns import PLAIN, Contender, StepOptions, circumstances, describe_circumstances

from nanogpt.config.options import option
from nanogpt.distributed.world import World
from nanogpt.model.gpt import GPTConfig, flops_per_token

COPIED_BYTES = 2**28  # beyond any cache
LAUNCHES = 20  # of a product on a GPU, timed together
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepTimeOptions(StepOptions, BenchmarkOptions):
    """What to measure, or which result to print."""

    rounds: int = option(4, "turns of each contender")
    steps: int = option(2, "in each turn", "steps")


def measure(options: StepTimeOptions, out: Path) -> dict[str, Any]:
    """Every contender, in turns."""
    words = as_words(options.step)
    model = GPTConfig(**options.shape)
    step_tokens = options.batch_size * options.context_length
    world = World.from_env()
    contenders = contenders_here(world)
    result: dict[str, Any] = {
        **circumstances(options, world),
        "products_flops": flops_per_token(model, context_length=0) * step_tokens,  # those with weights
        "step_s": {name: [] for name in contenders},
        "products_s": {dtype: [] for dtype in DTYPES},
        "copied_bytes_per_s": [],
    }
    with ExitStack() as stack:
        processes = []
        for name in contenders:  # one after the other: together they would fight for the cores
            processes.append(Contender(name, words, stack))
            (first_s,) = processes[-1].take(1)  # builds the model and what the first step allocates
            print(f"{name}: first step {_s(first_s)}", file=sys.stderr, flush=True)
        for _ in range(options.rounds):
            for process in processes:
                result["step_s"][process.name] += process.take(options.steps)
            for dtype in DTYPES:
                result["products_s"][dtype].append(products_s(model, step_tokens, DTYPES[dtype], world))
            result["copied_bytes_per_s"].append(copied_bytes_per_s(world))
    return result


def products_s(model: GPTConfig, tokens: int, dtype: torch.dtype, world: World) -> float:
    """Seconds of a step's products of tokens with weights and no more, forward and both backward ones of each."""
    wide = model.n_embd
    blocks = [(wide, 3 * wide), (wide, wide), (wide, 4 * wide), (4 * wide, wide)]
    return model.n_layer * sum(_products_s(tokens, *one, dtype, world) for one in blocks) + _products_s(
        tokens, wide, model.vocab_size, dtype, world
    )


def _products_s(tokens: int, inner: int, outer: int, dtype: torch.dtype, world: World) -> float:
    # Random: a GPU multiplies ones and zeros faster than a model's numbers.
    x, weight, gradient = (
        torch.randn(n, m, dtype=dtype, device=world.device)
        for n, m in ((tokens, inner), (outer, inner), (tokens, outer))
    )
    return sum(
        _least_s(work, world) for work in (lambda: x @ weight.T, lambda: gradient @ weight, lambda: gradient.T @ x)
    )


def copied_bytes_per_s(world: World) -> float:
    """Memory bandwidth as copying sees it: bytes read and bytes written, each counted."""
    a, b = torch.ones(2, COPIED_BYTES, dtype=torch.uint8, device=world.device)
    return 2 * COPIED_BYTES / _least_s(lambda: b.copy_(a), world)


def _least_s(work: Callable[[], object], world: World) -> float:
    """The least time of three, each of as many times in a row as outlast a GPU's launches."""
    times = 1 if world.device.type == "cpu" else LAUNCHES
    return min(world.seconds_of(lambda: [work() for _ in range(times)]) for _ in range(3)) / times


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    plain_s = median(result["step_s"][PLAIN])
    floor_s = median(min(pair) for pair in zip(*result["products_s"].values(), strict=True))
    lines = [
        f"{describe_circumstances(result)}; medians of {len(result['step_s'][PLAIN])} steps:",
        "",
        "| | a step | the plain loop's / this | products alone / this |",
        "|---|---|---|---|",
    ]
    for name, times in result["step_s"].items():
        lines.append(
            f"| {name} | {_s(median(times))} | {plain_s / median(times):.2f} | {floor_s / median(times):.0%} |"
        )
    rates = {d: result["products_flops"] / median(times) / 1e12 for d, times in result["products_s"].items()}
    products = ", ".join(f"{_s(median(result['products_s'][d]))} in {d} ({rates[d]:.2g} TFLOP/s)" for d in rates)
    copied = median(result["copied_bytes_per_s"]) / 1e9
    return "\n".join([*lines, "", f"Products of the step alone: {products}. Memory copied at {copied:.3g} GB/s."])


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, StepTimeOptions, measure, table)
