"""Ranks that share the reading of a checkpoint hold what each would have read alone."""

import json

import pytest

from harness.forks import forked_ranks
from harness.runs import WORKERS

RANKS = 3
CELL = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "subset_tokens": 1000, "context_length": 32, "learning_rate": 1e-3,
    "batch_size": 6, "dtype": "fp32",
}  # fmt: skip
CELLS = {
    "ddp": CELL | {"engine": "ddp"},
    "ddp, muon": CELL | {"engine": "ddp", "optimizer": "muon"},
    "zero 0": CELL | {"engine": "deepspeed", "zero_stage": 0},
    "zero 0, bf16": CELL | {"engine": "deepspeed", "zero_stage": 0, "dtype": "bf16"},
    "zero 2": CELL | {"engine": "deepspeed", "zero_stage": 2},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What three ranks, by which few sizes can be divided, found of each cell."""
    directory = tmp_path_factory.mktemp("restore")
    (directory / "cells.json").write_text(json.dumps(list(CELLS.values())))
    done = forked_ranks(RANKS, directory, WORKERS / "restore_worker.py", "cells.json", "found.json")
    assert done.returncode == 0, done.stderr
    return dict(zip(CELLS, json.loads((directory / "found.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_every_rank_holds_what_is_in_the_checkpoint(found, name):
    """Reference: each tensor read whole from the file, bit for bit, on every rank."""
    assert found[name]["wrong"] == [[]] * RANKS
    kinds = {tensor.partition("/")[0] for tensor in found[name]["sizes"]}
    assert {"weight", "mean"} <= kinds
    assert ("momentum_buffer" in kinds) == ("muon" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CELLS if name != "zero 2"])
def test_a_rank_reads_its_part(found, name):
    """Reference: a third of what every rank then holds, and of each tensor the remainder by three at most."""
    sizes = found[name]["sizes"].values()
    assert any(size % RANKS for size in sizes)
    expected = sum(size // RANKS + size % RANKS for size in sizes)
    assert found[name]["read"] == [expected] * RANKS
    assert expected < sum(sizes) / RANKS + RANKS * len(sizes)
