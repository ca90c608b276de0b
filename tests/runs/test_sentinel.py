"""A gradient that one rank computes wrongly is found before it is applied, and the rank is named."""

import json
import re

import pytest

from harness.forks import forked_ranks
from harness.runs import WORKERS

CELL = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "subset_tokens": 1000, "context_length": 32, "learning_rate": 1e-3,
    "batch_size": 6, "dtype": "fp32",
}  # fmt: skip
CELLS = {
    "ddp": CELL | {"engine": "ddp", "micro_batch_size": 1},
    "ddp, bf16": CELL | {"engine": "ddp", "dtype": "bf16"},
    "sharded, muon": CELL | {"engine": "sharded", "optimizer": "muon", "micro_batch_size": 1},
    "zero 0": CELL | {"engine": "deepspeed", "zero_stage": 0},
    "zero 1": CELL | {"engine": "deepspeed", "zero_stage": 1, "micro_batch_size": 1},
    "zero 2": CELL | {"engine": "deepspeed", "zero_stage": 2, "dtype": "bf16"},
    "zero 3": CELL | {"engine": "deepspeed", "zero_stage": 3},
}


@pytest.fixture(scope="module")
def of_three_ranks(tmp_path_factory):
    """What three ranks found of CELLS."""
    directory = tmp_path_factory.mktemp("sentinel")
    (directory / "cells.json").write_text(json.dumps([*CELLS.values()]))
    done = forked_ranks(3, directory, WORKERS / "sentinel_worker.py", "cells.json", "found.json")
    assert done.returncode == 0, done.stderr
    return dict(zip(CELLS, json.loads((directory / "found.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("engine", CELLS)
def test_a_gradient_is_checked_and_left_alone(of_three_ranks, engine):
    """Reference: losses and norms of the run without checks, bit for bit; one wrong tensor is named, and who is wrong.

    ZeRO 3 lets go of its weights in a backward, and no gradient is checked.
    """
    found = of_three_ranks[engine]
    assert found["checked"] == found["not"]
    for name in ("for good", "once", "again"):
        if engine == "zero 3":
            assert not found[name]
        else:
            named = r": rank 1 on \S+ computes another gradient of transformer\.h\.0\.mlp\.c_proj\.weight, by "
            assert re.search(named, found[name]), found[name]
