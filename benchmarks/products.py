"""How fast are a step's matrix products, by shape, order in memory and dtype?

python benchmarks/products.py
python benchmarks/products.py --table=benchmarks/results/products.zen5.2026-11-30.json

The first measures and writes JSON, the second prints it as a Markdown table. Each weight of the model has three
products: with its input, with the gradient of its output, and the gradient of itself. Each is measured with the weight
as it is stored, (outputs, inputs), and transposed. All take turns in one process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from parts.options import BenchmarkOptions, ModelOptions, run_benchmark
from torch import Tensor

from nanogpt.config.options import option
from nanogpt.distributed.world import World
from nanogpt.model.gpt import GPTConfig
from nanogpt.storage.provenance import installed_version

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# x (tokens, inputs), weight (outputs, inputs) or turned (inputs, outputs), gradient (tokens, outputs) of the output.
PRODUCTS: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]] = {
    "forward": {
        "as stored": lambda x, weight, turned, gradient: x @ weight.T,
        "transposed": lambda x, weight, turned, gradient: x @ turned,
    },
    "input's gradient": {
        "as stored": lambda x, weight, turned, gradient: gradient @ weight,
        "transposed": lambda x, weight, turned, gradient: gradient @ turned.T,
    },
    "weight's gradient": {
        "as stored": lambda x, weight, turned, gradient: gradient.T @ x,
        "transposed": lambda x, weight, turned, gradient: x.T @ gradient,
    },
}


@dataclass(frozen=True)
class ProductOptions(ModelOptions, BenchmarkOptions):
    """What to measure, or which result to print."""

    tokens: int = option(1024, "rows of a product: the tokens of a micro-batch", "tokens")
    turns: int = option(7, "of each product")


def measure(options: ProductOptions, out: Path) -> dict[str, Any]:
    """Every product in every order and dtype, in turns."""
    world = World.from_env()
    shape, wide = options.shape, options.n_embd
    weights = {  # (outputs, inputs), and how many there are
        "c_attn": (3 * wide, wide, options.n_layer),
        "attention's c_proj": (wide, wide, options.n_layer),
        "c_fc": (4 * wide, wide, options.n_layer),
        "MLP's c_proj": (wide, 4 * wide, options.n_layer),
        "lm_head": (GPTConfig(**shape).vocab_size, wide, 1),
    }
    rows = []
    for name, (outputs, inputs, count) in weights.items():
        for dtype in DTYPES:
            # Random: some hardware multiplies ones and zeros faster than a model's numbers.
            x, weight, gradient = (
                torch.randn(size, dtype=DTYPES[dtype], device=world.device)
                for size in ((options.tokens, inputs), (outputs, inputs), (options.tokens, outputs))
            )
            given = (x, weight, weight.T.contiguous(), gradient)
            seconds: dict[tuple[str, str], list[float]] = {}
            for turn in range(options.turns + 1):
                for product, orders in PRODUCTS.items():
                    for order, work in orders.items():
                        took = world.seconds_of(lambda work=work, given=given: work(*given))
                        if turn:  # the first one allocates
                            seconds.setdefault((product, order), []).append(took)
            rows += [
                {"weight": name, "outputs": outputs, "inputs": inputs, "count": count, "dtype": dtype}
                | {"product": product, "order": order, "seconds": took}
                for (product, order), took in seconds.items()
            ]
    return {
        "options": shape | {"tokens": options.tokens},
        "device": world.device_name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": installed_version("torch")},
        "products": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown: TFLOP/s of each product, and what a step's products come to."""
    shape = result["options"]
    cases = [(dtype, order) for dtype in DTYPES for order in ("as stored", "transposed")]
    lines = [
        f"{shape['tokens']:,} tokens, {result['device']}, {result['threads']} threads, torch "
        f"{result['versions']['torch']}; TFLOP/s by the median time:",
        "",
        f"| weight | product | {' | '.join(f'{dtype}, {order}' for dtype, order in cases)} |",
        f"|---|---|{'---|' * len(cases)}",
    ]
    found = {
        (row["weight"], row["product"], row["dtype"], row["order"]): row
        for row in result["products"]
    }  # fmt: skip
    for weight, product in dict.fromkeys((row["weight"], row["product"]) for row in result["products"]):
        of = [found[weight, product, dtype, order] for dtype, order in cases]
        rates = [2 * shape["tokens"] * row["outputs"] * row["inputs"] / median(row["seconds"]) / 1e12 for row in of]
        lines.append(f"| {weight} | {product} | {' | '.join(f'{rate:.2f}' for rate in rates)} |")
    for dtype in DTYPES:
        stored, best = 0.0, 0.0
        for weight, product in dict.fromkeys((row["weight"], row["product"]) for row in result["products"]):
            orders = [found[weight, product, dtype, order] for order in ("as stored", "transposed")]
            times = [row["count"] * median(row["seconds"]) for row in orders]
            stored, best = stored + times[0], best + min(times)
        lines += ["", f"All products of a step in {dtype}: {stored:.3g} s as stored, {best:.3g} s in the better order."]
    return "\n".join(lines)


if __name__ == "__main__":
    run_benchmark(__file__, __doc__, ProductOptions, measure, table)
