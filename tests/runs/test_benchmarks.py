"""The benchmarks run: each for one tiny round. What they measure is no test's matter."""

import json
import re
import shutil
import sys
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.forks import ForkedProgram, train
from harness.runs import REPOSITORY, flags, report, wait_for

if not (find_spec("transformers") and find_spec("accelerate")):  # which take seconds to import
    pytest.skip("needs transformers and accelerate, which the extra [dev] installs", allow_module_level=True)
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import golden_curves
import on_gpu
import recall_cost
import time_to_target
from eta_backtest import take_together
from parts import alpha_beta
from parts.options import machine, result_path

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.evaluate.recall import Forward, full_pass
from nanogpt.model.gpt import GPT
from nanogpt.optim.recipe import recipe_of
from nanogpt.plan.plan import make_plan
from nanogpt.storage.hf import load_hf, read_hf_shape
from nanogpt.storage.json_file import FORMAT_VERSION, parse_json

TINY_SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 8, "subset_tokens": 40}


@pytest.fixture
def benchmark(tmp_path, forked):
    """benchmark(SCRIPT, OPTIONS) is the JSON of a round of it. The table that is printed is the one of --table."""

    def of(name, **options):
        script, out = REPOSITORY / "benchmarks" / name, tmp_path / "result.json"
        done = forked(tmp_path, script, f"--out={out}", *flags(**options))
        assert done.returncode == 0, done.stderr
        again = forked(tmp_path, script, f"--table={out}")
        assert done.stdout == again.stdout, again.stderr
        assert sum(line.startswith("|") for line in done.stdout.splitlines()) > 2, "at least a row under the head"
        return json.loads(out.read_text())

    return of


@pytest.mark.slow
def test_step_time(benchmark):
    """Invariant: every contender takes all its steps, and none is timed by another's clock."""
    result = benchmark("step_time.py", **TINY_SHAPE, rounds=2, steps=3, batch_size=4)
    assert {len(times) for times in result["step_s"].values()} == {6}
    assert min(seconds for times in result["step_s"].values() for seconds in times) > 0
    assert len({tuple(times) for times in result["step_s"].values()}) == len(result["step_s"])
    assert "transformers Trainer, fp32" in result["step_s"]
    # 6 x (12 x 16^2 + 50257 x 16) x 32 tokens
    assert result["products_flops"] == 154_979_328 == 6 * (12 * 16**2 + 50257 * 16) * 32


@pytest.mark.slow
def test_step_profile(benchmark):
    """Invariant: each contender's step multiplies matrices, and only the fast recipe's stacks of them."""
    found = benchmark("step_profile.py", **TINY_SHAPE, batch_size=4, steps=1)["ms_per_step"]
    assert "transformers Trainer, fp32" in found
    assert all(ms["aten::mm"] > 0 for ms in found.values())
    assert {name for name, ms in found.items() if "aten::baddbmm" in ms} == {"ours, fast recipe"}


@pytest.mark.slow
def test_scaling(benchmark):
    """Invariant: two ranks take all their steps on both engines, and every size of all-reduce is timed."""
    shape = {name: value for name, value in TINY_SHAPE.items() if name.startswith("n_")}
    result = benchmark("scaling.py", **shape, ranks="2", rounds=1, steps=3, times=2)
    for found in (result["step_s"], result["communication_share"]):
        assert {name: [len(figures) for figures in of.values()] for name, of in found.items()} == {
            "DDP": [2],
            "sharded": [2],
        }
    assert list(result["all_reduce_s"]) == ["2"]
    assert min(result["all_reduce_s"]["2"].values()) > 0


@pytest.mark.slow
def test_head_dtype(benchmark):
    """Invariant: both runs are the same but for the head, from the first step on."""
    shape = TINY_SHAPE | {"context_length": 16}
    runs = benchmark("head_dtype.py", **shape, max_steps=2)["runs"]
    assert {name: run["steps"] for name, run in runs.items()} == {"auto": 2, "fp8": 2}
    assert 0 < abs(runs["fp8"]["loss"] - runs["auto"]["loss"]) < 0.01


@pytest.mark.slow
def test_sentinel(benchmark):
    """Invariant: who is found is named, what is above the tolerance is found, and no run without a fault is."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    result = benchmark("sentinel.py", **shape, pairs=1, flips=3, runs=2)
    gradients, held, doubled = (result[name] for name in ("gradient_flips", "flips", "doubled_gradients"))
    assert [len(each) for each in (held, gradients, result["alarms"])] == [3, 3, 0]
    assert all(flip["found"] and flip["named"] and flip["parameter_named"] for flip in doubled), doubled
    assert len(doubled) == 16, "every parameter"
    assert all(flip["named"] for flip in held + gradients if flip["found"])
    assert all(flip["found"] for flip in gradients if flip["size"] is None or flip["size"] > 2 * result["tolerance"])


def test_the_fit_finds_latency_and_bandwidth_again():
    """Reference: times made of a known link."""
    link = alpha_beta.Link(alpha_s=20e-6, bytes_per_s=2e9)
    made = {ranks: {nbytes: link.ring_s(nbytes, ranks) for nbytes in (1024, 2**16, 2**24)} for ranks in (2, 4)}
    found = alpha_beta.fit_link(made)
    assert found.alpha_s == pytest.approx(link.alpha_s)
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s)


def test_a_predicted_step_hides_what_it_can():
    """Reference: by hand, 4 ranks, 1 GB of weights at 1 GB/s without latency, 0.2 GB of it in one parameter.

    A ring sends 1.5 bytes a byte: the last bucket takes 0.3 s, the others 1.2 s, a gather of all half of both, 0.75 s.
    The sums before an update are too few bytes to be seen.
    """
    link, parameters = alpha_beta.Link(alpha_s=0.0, bytes_per_s=1e9), {"parameters": 250_000_000}

    def step_s(strategy, compute_s, link=link, ranks=4, **more):
        sizes = parameters | {"largest_parameter": 50_000_000}
        return alpha_beta.step_s(strategy, **sizes, compute_s=compute_s, ranks=ranks, link=link, **more)

    assert step_s("DDP", 100.0) == pytest.approx(100 + 0.3)  # all hidden but the last bucket
    assert step_s("DDP", 0.3) == pytest.approx(0.3 + (1.2 - 0.2) + 0.3)
    assert step_s("ZeRO 2", 100.0) == pytest.approx(100 + 0.15 + 0.75)
    assert step_s("sharded", 100.0, update_s=8.0) == pytest.approx(92 + 8 / 4 + 0.15 + 0.75)
    # 0.4 GB of matrices: reduced in 0.3 s, 0.15 in bf16, and gathered in 0.15; the rest in 0.45 s each
    assert step_s("sharded", 0.15, in_bf16=100_000_000) == pytest.approx(0.15 + (0.15 - 0.1) + 0.45 + 0.15 + 0.45)
    between = step_s("sharded", 0.15, in_bf16=100_000_000, is_one_node=False)
    assert between == pytest.approx(0.15 + (0.3 - 0.1) + 0.45 + 0.15 + 0.45)
    assert step_s("sharded", 0.6, update_s=0.3) == pytest.approx(0.3 + 0.3 / 4 + (0.6 - 0.2) + 0.15 + 0.75)
    assert step_s("ZeRO 3", 0.3) == pytest.approx(0.3 + (0.75 - 0.1) + (0.75 + 0.6 - 0.2) + 0.15)
    assert step_s("ZeRO 3", 0.3, ranks=1) == 0.3
    # 31 buckets of 25 MiB or less, the last one and the sums, each two latencies up a tree of 4 and two back
    slow = alpha_beta.Link(alpha_s=1.0, bytes_per_s=1e30)
    assert step_s("DDP", 0.0, slow) == pytest.approx(33 * 4)
    # 32 buckets of 4 x 6 MiB or less and the last one, three latencies round a ring of 4 each, twice; and the sums
    assert step_s("sharded", 0.0, slow) == pytest.approx(2 * 33 * 3 + 4)


def test_what_a_gpu_told_is_printed(tmp_path, forked):
    """Invariant: a table for each section that came to something, and why another did not; no GPU, no measurement."""
    tiny = {"windows": 2, "context_length": 8, "recipe": "fast", "collectives": True, "compiled": False}
    tiny["head_dtype"] = "fp8"
    measured = {
        "mfu": 0.5, "allocated_bytes": 2e9, "ready_s": 1.0, "cuda_graphs": False, "not_compiled": "",
        "alone_s": [2e-3], "in_a_row_s": [1e-3],
    }  # fmt: skip
    rows = [
        tiny | measured | {"engine": "single", "graphs": False, "losses": [2.0]},
        tiny | measured | {"engine": "sharded", "graphs": True, "losses": [2.02]},
        tiny | {"engine": "sharded", "graphs": True, "failure": "RuntimeError: a | b"},
    ]
    phases_s = dict.fromkeys(("data", "compute", "communication", "checkpoint", "full_pass", "rest"), 0.5)
    row = {"step": 10, "wall_s": 3.0, "step_s": 9e-3, "full_pass_loss": 0.09, "phases_s": phases_s}
    run = {"steps": 10, "reached": True, "train_s": 4.0, "launch_s": 9.0, "rows": [row]}
    sections = {
        "gpu_tests": {"status": "skipped", "why": "5 s are left, it needs 60"},
        "steps": {
            "status": "timed out after 9 s",
            "seconds": 9.0,
            "last_lines": ["stuck", ""],
            "result": {"steps": rows},
        },
        "default_run": {"status": "done", "seconds": 8.0, "result": run},
    }
    result = {
        "gpus": ["NVIDIA H200"], "cuda": "13.0", "nccl": "2.28", "cores": 2, "began": "2026-11-30", "seconds": 17.0,
        "code": {"versions": {"torch": "2.11.0"}}, "options": {"rehearse": "false"}, "sections": sections,
    }  # fmt: skip
    (tmp_path / "on_gpu.json").write_text(json.dumps(result))
    script = REPOSITORY / "benchmarks" / "on_gpu.py"
    done = forked(tmp_path, script, "--table=on_gpu.json")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "| gpu_tests | skipped: 5 s are left, it needs 60 | 0 |" in said
    assert "| steps | timed out after 9 s: stuck | 9 |" in said
    how = "sharded with collectives, graphs"
    assert f"| 2 x 8 | Muon | {how} (not captured), head in FP8 | 2 ms | 1 ms | 50% | 2.0 GB | 1.0 s | 0.01 |" in said
    assert f"| 2 x 8 | Muon | {how}, head in FP8 | RuntimeError: a / b |  |  |  |  |  |" in said
    assert "| 0.50 s | 0.50 s | 0.50 s | 0.50 s | 0.50 s | 0.50 s |" in said
    done = forked(tmp_path, script, "--out=other.json", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, "error: there is no GPU here: --rehearse=true tries the program without one",
    )  # fmt: skip
    assert not (tmp_path / "other.json").exists()


def test_a_section_that_hangs_ends_with_what_it_has_started(tmp_path, monkeypatch):
    """Invariant: its time is up, the status says so, its children are gone, and what it wrote until then is kept."""
    worker = tmp_path / "benchmarks" / "on_gpu_worker.py"
    worker.parent.mkdir()
    worker.write_text(
        "import json, pathlib, subprocess, sys\n"
        "out = next(word for word in sys.argv if word.startswith('--out='))[6:]\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "pathlib.Path(out).write_text(json.dumps({'child': child.pid}))\n"
        "print('waiting', flush=True)\n"
        "child.wait()\n"
    )
    monkeypatch.setattr(on_gpu, "REPOSITORY", tmp_path)
    told = on_gpu.run_section(on_gpu.Section("steps", 1, 2), 2.0, tmp_path / "on_gpu.log", "true")
    assert (told["status"], told["last_lines"]) == ("timed out after 2 s", ["waiting"])
    stat = Path(f"/proc/{told['result']['child']}/stat")
    assert not stat.exists() or " Z " in stat.read_text()


@pytest.mark.slow
def test_time_to_target(benchmark):
    """Invariant: each of these contenders is ended by max_steps; the Trainer's loop and other endings are below."""
    result = benchmark("time_to_target.py", **TINY_SHAPE, seeds=1, max_steps=5, contenders="fast,fp32")
    assert [(one["contender"], one["reached"], one["steps"]) for one in result["runs"]] == [
        ("ours, fast recipe", False, 5),
        ("plain loop, fp32", False, 5),
    ]


@pytest.mark.slow
def test_recall_cost(tmp_path, benchmark, forked):
    """Invariant: a run that is stopped before its target does not go on; one that has ended is not made again."""
    options = TINY_SHAPE | {"max_steps": 2, "runs": "runs"}
    first = benchmark("recall_cost.py", **options, seeds=1)["runs"]
    runs = benchmark("recall_cost.py", **options, seeds=2, recipes="reference")["runs"]
    found = [(run["recipe"], run["seed"], run["recall"]["steps"]) for run in first + runs]
    assert found == [("reference", 0, 2), ("fast", 0, 2), ("reference", 0, 2), ("reference", 1, 2)]
    assert runs[0] == first[0]
    done = forked(
        tmp_path, REPOSITORY / "benchmarks" / "recall_cost.py", "--out=other.json", *flags(**options), "--ema=0.9"
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 2), done.stderr  # where the result goes, and the error
    assert "holds a run with another --ema" in done.stderr


@pytest.mark.slow
def test_products(benchmark):
    """Invariant: three products of each of five weights, in both orders and dtypes."""
    rows = benchmark("products.py", n_layer=1, n_head=2, n_embd=16, tokens=32, turns=2)["products"]
    assert len(rows) == 3 * 5 * 2 * 2
    assert min(seconds for row in rows for seconds in row["seconds"]) > 0


@pytest.mark.slow
def test_a_plain_loop_is_ended_by_a_full_pass(tmp_path, forked):
    """Invariant: by the first of its passes, one each 10 steps, that is at the target, in the Trainer too."""
    script, out = REPOSITORY / "benchmarks" / "plain_loop.py", tmp_path / "plain.json"
    options = flags(**TINY_SHAPE, loop="trainer", target_loss=10.0)
    done = forked(tmp_path, script, f"--out={out}", *options)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    *before, last = told["passes"]
    assert [one["step"] for one in told["passes"]] == [*range(10, told["steps"] + 1, 10)]
    assert last["loss"] == told["loss"] <= 10.0 < min(one["loss"] for one in before)
    assert (told["reached"], told["over"]) == (True, True)


@pytest.mark.slow
def test_a_killed_plain_loop_leaves_a_result_that_is_not_over(tmp_path, forked):
    """Invariant: it says so, at which step its newest pass was, and of what it is; no other loop overwrites it."""
    script, out = REPOSITORY / "benchmarks" / "plain_loop.py", tmp_path / "plain.json"
    options = flags(**TINY_SHAPE, target_loss=6.0, max_steps=10**4, pass_every=1)  # a pass at each step from the first
    command = (script, f"--out={out}", *options)
    program = ForkedProgram(1, tmp_path, tmp_path / "log", *command)
    try:
        wait_for(lambda: out.exists() and json.loads(out.read_text())["passes"], program)
        assert program.poll() is None
    finally:
        program.kill()
    told = json.loads(out.read_text())
    assert (told["over"], told["reached"]) == (False, False)
    assert told["steps"] == told["passes"][-1]["step"] > 0
    assert told["loss"] == told["passes"][-1]["loss"] > 6.0
    assert (told["options"]["n_embd"], told["options"]["loop"]) == (TINY_SHAPE["n_embd"], "fp32")
    again = forked(tmp_path, *command)
    assert (again.returncode, again.stderr.splitlines()[-1]) == (2, f"error: --out={out} is there already")


def test_a_contender_that_fails_is_named(tmp_path, monkeypatch):
    """Invariant: time_to_target.py ends with the words that failed, their status and what they said."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "plain_loop.py").write_text("import sys; print('no', file=sys.stderr); sys.exit(2)")
    monkeypatch.setattr(time_to_target, "REPOSITORY", tmp_path)
    with pytest.raises(SystemExit, match=r"^--loop=fp32 --n_head=0 left with status 2:\nno$"):
        time_to_target.run_plain("--loop=fp32", "--n_head=0")


def test_a_plain_loop_is_judged_as_a_run_is(tmp_path):
    """Reference: recall.full_pass of the same weights, 3e-7 away on a CPU: two programs' sums in fp32."""
    import plain_loop
    from parts.plain import gpt2

    world = World.from_env()
    plan = make_plan(TrainConfig(**TINY_SHAPE), world)
    plain = gpt2({"n_layer": 1, "n_head": 2, "n_embd": 16}, world.device, seed=0)
    plain.save_pretrained(tmp_path)
    model = GPT(read_hf_shape(tmp_path)).to(world.device)
    load_hf(model, tmp_path)
    ours = full_pass(model, plan.dataset.windows, plan.dataset.judged, Forward(world, "fp32", 5))
    assert plain_loop.full_pass(plain, plan, bf16=False) == pytest.approx(ours, rel=1e-6)
    assert plain.training


@pytest.mark.slow
def test_recipe_trace(tmp_path, benchmark):
    """Reference: train_overfit.py with the same options; rounding aside it must judge the same averaged weights.

    2e-4 of the loss: the two make the cross-entropy of the same logits in fp32 in two ways, and torch's own is that far
    from the exact one on a CPU (nanogpt's LOSS_SLACK); with AVX2 alone they were 0.9e-4 apart, with AVX-512 less.
    """
    recipe, steps = "reference", 36
    same = {"recipe": recipe, "n_layer": 2, "n_head": 2, "n_embd": 64, "subset_tokens": 130, "learning_rate": 6e-3}
    same |= {"context_length": 16, "ema": 0.9, "dtype": "fp32"}  # as scores are
    (trace,) = benchmark("recipe_trace.py", **same, steps=steps, from_step=steps - 8, every=4)["traces"]
    assert [row["step"] for row in trace["rows"]] == [steps - 8, steps - 4, steps]
    below = recipe_of(TrainConfig(recipe=recipe)).decay_threshold(TrainConfig.target_loss)
    assert trace["rows"][-1]["train_loss"] < below, "else nothing would be averaged"
    assert train(*flags(**same, max_steps=steps, wandb="disabled"), cwd=tmp_path).returncode == 3
    last, told = trace["rows"][-1], report(tmp_path / "out")
    assert last["full_pass_loss"] == pytest.approx(told["loss"], rel=2e-4)
    assert last["exact_recall"] == pytest.approx(told["full_pass"]["exact_recall"])
    assert last["exact_recall"] > 0


@pytest.mark.slow
def test_a_recipe_trace_with_other_figures(tmp_path, benchmark, forked):
    """Invariant: the recipe's own figures by name change nothing, others do; what means nothing is refused."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "subset_tokens": 130, "learning_rate": 1e-2}
    own = {"positions_rate": 0.16, "rest_rate": 0.006, "channels": 16}
    for figures in ({}, own, {"positions_rate": 0.01}, {"rest_rate": 0.01}, {"channels": 8}):
        found = benchmark("recipe_trace.py", **shape, **figures, steps=3, from_step=3, every=1)
    losses = [trace["rows"][0]["full_pass_loss"] for trace in found["traces"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len({round(loss, 4) for loss in losses}) == 4
    script = REPOSITORY / "benchmarks" / "recipe_trace.py"
    for wrong in ("--recipe=reference --rest_rate=1e-3", "--recipe=reference --channels=64", "--channels=100"):
        done = forked(tmp_path, script, *wrong.split())
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_rows_of_a_step_are_taken_together_as_a_run_logs_them():
    """Reference: by hand; the run logged the steps 10 and 20, and 13 for its full pass."""
    rows = [{"step": step, "loss": float(step)} for step in range(1, 26)]
    rows[12]["full_pass_loss"] = 0.5
    taken = list(take_together(rows, 10))
    assert [(row["step"], len(row["step_losses"]), sum(row["step_losses"])) for row in taken] == [
        (10, 10, 55), (13, 3, 36), (20, 7, 119),
    ]  # fmt: skip
    coarse = [{"step": 8, "loss": 2.0}, {"step": 20, "loss": 3.0}]
    assert [row["step_losses"] for row in take_together(coarse, 10)] == [[2.0] * 8 + [3.0] * 12]


@pytest.fixture
def ended(finished, tmp_path):
    """The tiny run's directory without its checkpoints, which may be changed."""
    return shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))


def edit(path, **keys):
    """Write other keys into a file of JSON."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("name", ["report.json", "config.json"])
def test_a_newer_run_is_refused(ended, forked, name):
    """Invariant: one line that names the file and its version, status 2, and no curve is written."""
    edit(ended / name, format_version=FORMAT_VERSION + 1)
    script, words = REPOSITORY / "benchmarks" / "record_curve.py", flags(run="run", out="curve.jsonl")
    done = forked(ended.parent, script, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{name} has format_version {FORMAT_VERSION + 1}" in done.stderr
    assert not (ended.parent / "curve.jsonl").exists()


def test_scores_of_another_version_are_no_cost_of_recall(ended):
    """Invariant: a run that has ended is taken with its scores, and refused where they cannot be read."""
    assert recall_cost.told(recall_cost.ended(ended, {}))["steps"] == report(ended)["steps"]
    edit(ended / "report.json", full_pass={})
    with pytest.raises(ConfigError, match="run was scored by another version: name other --runs"):
        recall_cost.ended(ended, {})


def test_the_golden_curves_follow_from_what_was_recorded():
    """Reference: the package's asset, of the newest result: curves of its first seed, and the bands."""
    newest = sorted((REPOSITORY / "benchmarks" / "results").glob("golden_curves.*.json"))[-1]
    written = parse_json((REPOSITORY / "nanogpt" / "assets" / "golden_curves.json").read_bytes())
    assert golden_curves.asset(parse_json(newest.read_bytes())) == written


def test_the_record_of_runs_is_what_is_kept_of_them(tmp_path, forked):
    """Reference: the package's asset, which this script writes of the curves and reports that are kept."""
    script, out = REPOSITORY / "benchmarks" / "record_reference_runs.py", tmp_path / "reference_runs.json"
    done = forked(tmp_path, script, f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert out.read_text() == (REPOSITORY / "nanogpt" / "assets" / "reference_runs.json").read_text()


@pytest.mark.parametrize(
    ("device_name", "named"),
    [
        ("NVIDIA H200", "h200"),
        ("AMD EPYC (family 26, model 2)", "zen5"),
        ("AMD EPYC (family 25, model 17)", "epyc"),
        ("Intel(R) Xeon(R) Processor (family 6, model 143)", "xeon"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "xeon-2-20ghz"),
        ("cpu", "cpu"),
    ],
)
def test_a_result_is_named_by_what_machine_and_date(device_name, named):
    """Reference: names of devices as they were met, written by hand."""
    assert machine(device_name) == named
    what, machine_too, day, ending = result_path("step_time", device_name).name.split(".")
    assert (what, machine_too, ending) == ("step_time", named, "json")
    assert date.fromisoformat(day) <= date.today()


def test_results_are_quoted():
    """Invariant: each kept result is named WHAT.MACHINE.DATE.json, and a page quotes it."""
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "benchmarks").glob("*.md")]
    quoted = "".join(page.read_text() for page in pages)
    for path in (REPOSITORY / "benchmarks" / "results").iterdir():
        assert re.fullmatch(r"\w+\.[a-z0-9-]+\.\d{4}-\d\d-\d\d\.json", path.name)
        assert path.name in quoted, path.name


def test_an_out_that_cannot_be_is_refused_before_anything_is_measured(tmp_path, forked):
    """Invariant: status 2 and one line, for a result that is to be written or read."""
    script = REPOSITORY / "benchmarks" / "zero_memory.py"
    for word, why in (
        (f"--out={tmp_path}/nowhere/result.json", "there is no folder"),
        (f"--table={tmp_path}/no.json", "No such file"),
        ("--ranks=0", "must be a positive number"),
    ):
        done = forked(tmp_path, script, word)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert why in done.stderr
