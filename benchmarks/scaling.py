"""How a step scales with the ranks: measured on this machine, predicted for 8 to 1,024 GPUs.

python benchmarks/scaling.py --ranks=1,2,4
python benchmarks/scaling.py --table=benchmarks/results/scaling.epyc.2026-11-30.json

The first trains and writes JSON, the second prints it as Markdown. Every rank has one thread, and all of them share one
global batch; DDP and the sharded engine take turns. An alpha-beta model is fitted to measured all-reduces; the same
model, with latency and bandwidth of GPUs' links that are assumed and not measured, then predicts larger clusters.
"""

import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from all_reduce_worker import SIZES
from parts.alpha_beta import DDP, SHARDED, Link, fit_link, step_s
from parts.options import BenchmarkOptions, ModelOptions, as_words, run_benchmark, task_option
from parts.runs import SHORT_TEXT, all_reduces, train

from nanogpt.config.errors import ConfigError
from nanogpt.config.options import option
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.storage.json_file import write_json

GPUS = tuple(2**i for i in range(3, 11))
ENGINES = {DDP: "ddp", SHARDED: "sharded"}  # that are measured, alone too, where DDP is the single engine
STRATEGIES = (SHARDED, DDP, "ZeRO 1", "ZeRO 2", "ZeRO 3")
GPUS_A_NODE = 8
WITHIN = Link(alpha_s=5e-6, bytes_per_s=360e9)  # NVLink 4: 450 GB/s a direction, four fifths of it
BETWEEN = Link(alpha_s=15e-6, bytes_per_s=320e9)  # eight 400 Gb/s adapters a node, each for a ring, four fifths of it
GPU_WINDOWS, GPU_CONTEXT = 16, 64
# Of so many on one H200, results/gpu_steps.h200.2026-11-26.json. A step of the sharded engine is CUDA graphs there.
GRAPHS_S, KERNEL_BY_KERNEL_S = 9.2e-3, 22.4e-3
UPDATE_S = 1.8e-3  # of GRAPHS_S: the update and the average, which sharded ranks make of their parts


@dataclass(frozen=True)
class ScalingOptions(ModelOptions, BenchmarkOptions):
    """What to measure, or which result to print."""

    ranks: str = option("1,2,4", "processes on this machine, with commas between")
    n_layer: int = task_option("n_layer", 4)
    steps: int = option(10, "training steps of each number of ranks", "steps")
    rounds: int = option(2, "turns of each number of ranks")
    times: int = option(20, "all-reduces of each size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(word.isdecimal() and int(word) > 0 for word in self.ranks.split(",")):
            raise ConfigError(f"--ranks={self.ranks} must be numbers with commas between")


def measure(options: ScalingOptions, out: Path) -> dict[str, Any]:
    """Steps, in turns of each number of ranks and engine, and all-reduces."""
    counts = [int(word) for word in options.ranks.split(",")]
    result: dict[str, Any] = {
        "options": options.shape | {"rounds": options.rounds, "steps": options.steps},
        "cores": os.cpu_count(),
        "step_s": {name: {ranks: [] for ranks in counts} for name in ENGINES},
        "communication_share": {name: {ranks: [] for ranks in counts} for name in ENGINES},
        "all_reduce_s": {ranks: all_reduces(ranks, options.times) for ranks in counts if ranks > 1},
    }
    for _ in range(options.rounds):
        for ranks, name in product(counts, ENGINES):
            engine = "single" if (name, ranks) == (DDP, 1) else ENGINES[name]
            words = [*as_words(options.shape), *SHORT_TEXT, f"--engine={engine}", f"--max_steps={options.steps}"]
            run = train(*words, ranks=ranks, threads=1)
            settled = run.rows[len(run.rows) // 3 :]  # the first steps allocate and connect
            result["step_s"][name][ranks] += [row["step_s"] for row in settled]
            result["communication_share"][name][ranks] += [row["time_share"]["communication"] for row in settled]
            result |= run.circumstances()
        write_json(out, result)
    return result


def table(result: dict[str, Any]) -> str:
    """The result in Markdown: steps, all-reduces beside the fitted model, the prediction with what it assumes."""
    measured = {int(n): {int(b): s for b, s in by.items()} for n, by in result["all_reduce_s"].items()}
    links = {ranks: fit_link({ranks: by_size}) for ranks, by_size in measured.items()}
    return "\n\n".join([_steps(result, links), _fit(measured, links), _prediction()])


def _steps(result: dict[str, Any], links: dict[int, Link]) -> str:
    shape, step_s_of, shares = result["options"], result["step_s"], result["communication_share"]
    if isinstance(next(iter(step_s_of.values())), list):  # results were of DDP alone
        step_s_of, shares = {DDP: step_s_of}, {DDP: shares}
    first, times = next(iter(step_s_of[DDP].items()))
    alone_s = median(times) * int(first)
    sizes = _sizes({name: shape[name] for name in ("n_layer", "n_head", "n_embd")})
    lines = [
        f"{shape['n_layer']} layers of {shape['n_embd']} channels, 16 x 64 tokens a step whatever the ranks, "
        f"{result['dtype']}, one thread a rank, {result['cores']} cores of {result['device']}; medians of {len(times)} "
        f"steps. Foreseen: the first row's time shared out over the cores, and the model below with the link fitted to "
        f"as many ranks' all-reduces:",
        "",
        "| ranks | engine | a step | foreseen | speed-up | of the time waiting for other ranks |",
        "|---|---|---|---|---|---|",
    ]
    for ranks, name in product(step_s_of[DDP], step_s_of):
        s, waiting, count = median(step_s_of[name][ranks]), median(shares[name][ranks]), int(ranks)
        foreseen = "-"
        if count in links:
            compute_s = alone_s / min(count, result["cores"])
            foreseen = f"{step_s(name, **sizes, compute_s=compute_s, ranks=count, link=links[count]):.3g} s"
        engine = "single" if (name, count) == (DDP, 1) else name
        lines.append(
            f"| {ranks} | {engine} | {s:.3g} s | {foreseen} | {alone_s / int(first) / s:.2f} | {waiting:.0%} |"
        )
    return "\n".join(lines)


def _fit(measured: dict[int, dict[int, float]], links: dict[int, Link]) -> str:
    if not measured:
        return "No all-reduce was measured."
    named = " and ".join(
        f"{1e6 * link.alpha_s:.0f} us and {link.bytes_per_s / 1e9:.2g} GB/s with {ranks} ranks"
        for ranks, link in links.items()
    )
    lines = [
        f"All-reduces over gloo; latency and bandwidth of a message fitted to them: {named}.",
        "",
        "| bytes | " + " | ".join(f"{ranks} ranks, measured | fitted" for ranks in measured) + " |",
        "|---|" + "---|---|" * len(measured),
    ]
    for nbytes in SIZES:
        cells = [
            f"{_ms(by_size[nbytes])} | {_ms(links[ranks].ring_s(nbytes, ranks))}" for ranks, by_size in measured.items()
        ]
        lines.append(f"| {nbytes:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _prediction() -> str:
    sizes, matrices = _sizes({}), GPTConfig().n_layer * GPTConfig().block_matrices
    lines = [
        f"Predicted for H100s; only one GPU was ever measured. Assumed: {GPU_WINDOWS} windows of {GPU_CONTEXT} tokens "
        f"on every GPU, so that the global batch grows with them; {sizes['parameters']:,} parameters, sent in fp32, "
        f"by {SHARDED} the {matrices:,} of the blocks' matrices in bf16, their gradients in one node alone; "
        f"computing as one H200 takes: {_ms(GRAPHS_S)} for {SHARDED}, whose step is CUDA graphs, collectives and all, "
        f"{_ms(UPDATE_S)} of it shared out over the ranks, and {_ms(KERNEL_BY_KERNEL_S)} for the others, kernel by "
        f"kernel; none of it disturbed by communication; {GPUS_A_NODE} GPUs a node joined at "
        f"{WITHIN.bytes_per_s / 1e9:.0f} GB/s and {WITHIN.alpha_s * 1e6:.0f} us, nodes at "
        f"{BETWEEN.bytes_per_s / 1e9:.0f} GB/s (an adapter a GPU, each carrying a ring of its own) and "
        f"{BETWEEN.alpha_s * 1e6:.0f} us, which beyond one node every message takes; rings for reduce-scatter and "
        f"all-gather; no stragglers. A step, and what one GPU alone, with graphs, would take of it:",
        "",
        "| GPUs | " + " | ".join(STRATEGIES) + " |",
        "|---|" + "---|" * len(STRATEGIES),
    ]
    for ranks in GPUS:
        link = WITHIN if ranks <= GPUS_A_NODE else BETWEEN
        cells = []
        for strategy in STRATEGIES:
            computing = {"compute_s": GRAPHS_S, "update_s": UPDATE_S, "in_bf16": matrices}
            if strategy != SHARDED:
                computing = {"compute_s": KERNEL_BY_KERNEL_S}
            one_node = ranks <= GPUS_A_NODE
            s = step_s(strategy, **sizes, **computing, ranks=ranks, link=link, is_one_node=one_node)
            cells.append(f"{_ms(s)}, {GRAPHS_S / s:.0%}")
        lines.append(f"| {ranks:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sizes(shape: dict[str, int]) -> dict[str, int]:
    """What step_s must know of a model."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape))
    return {
        "parameters": model.num_parameters(),
        "largest_parameter": max(parameter.numel() for parameter in model.parameters()),
    }


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, ScalingOptions, measure, table)
