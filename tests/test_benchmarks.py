"""The benchmarks run: each for one tiny round. What they measure is no test's matter."""

import json
import sys

import pytest

from conftest import REPOSITORY, flags, run

pytest.importorskip("transformers")
TINY_SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 8, "subset_tokens": 40}


def benchmark(name, tmp_path, **options):
    """A round of it -> its JSON. The table that is printed is the one that --table prints."""
    script, out = REPOSITORY / "benchmarks" / name, tmp_path / "result.json"
    done = run(sys.executable, script, f"--out={out}", *flags(**options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = run(sys.executable, script, f"--table={out}", cwd=tmp_path)
    assert done.stdout == again.stdout
    assert done.stdout.count("\n|") > 2
    return json.loads(out.read_text())


def test_step_time(tmp_path):
    """Invariant: every contender takes all its steps, and none is timed by another's clock."""
    result = benchmark("step_time.py", tmp_path, **TINY_SHAPE, rounds=2, steps=3, batch_size=4)
    assert {len(times) for times in result["step_s"].values()} == {6}
    assert "transformers Trainer, fp32" in result["step_s"]
    # 6 x (12 x 16^2 + 50257 x 16) x 32 tokens
    assert result["products_flops"] == 154_979_328 == 6 * (12 * 16**2 + 50257 * 16) * 32


def test_time_to_target(tmp_path):
    """Invariant: each contender is ended by a full pass at the target, or by max_steps."""
    result = benchmark("time_to_target.py", tmp_path, **TINY_SHAPE, seeds=1, max_steps=5)
    assert [(one["contender"], one["reached"], one["steps"]) for one in result["runs"]] == [
        ("plain loop, fp32", False, 5),
        ("reference", False, 5),
        ("fast", False, 5),
    ]
