"""Whole runs of a tiny model: it reaches its target, recites, repeats itself, and gives up in an orderly way."""

import contextlib
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from harness import runs
from harness.forks import forked_ranks, train
from harness.runs import SHORT, TINY, TRAIN, assert_verified, environment, flags, metrics, report
from nanogpt.data.corpus import read_corpus
from nanogpt.data.tokenizer import encode
from nanogpt.model.gpt import GPT, GPTConfig

METRICS_KEYS = (
    "step tokens loss lr grad_norm tokens_per_s step_s mfu eta_s eta_low_s eta_high_s eta_note wall_s "
    "memory_bytes full_pass_loss full_pass_recall fastest_rank_step_s slowest_rank_step_s slowest_rank "
    "slowest_rank_host slowest_rank_ratio time_share"
)
REPORT_KEYS = (
    "reached exit_reason target_loss loss strided_loss floor steps tokens launch_s train_s device_s recall engine "
    "world_size corpus_sha256 full_pass control control_note scores_precision scores_s weights_sha256 data "
    "subset_tokens context_length stride phase judged_grids seed versions git_commit random_offset_loss "
    "reference_loss memorised_bits bits_per_parameter compiled cuda_graphs target_recall"
)


def test_a_run_reaches_its_target(finished):
    """Invariant: it says reached exactly when the full-pass loss is at or below the target."""
    out_dir, printed = finished
    told = report(out_dir)
    assert told["reached"] is True
    assert told["exit_reason"] == "target_reached"
    assert told["loss"] <= told["target_loss"] == 0.099
    assert told["floor"] <= told["loss"]
    assert f"target reached: full-pass loss {told['loss']:.4f}" in printed


def test_the_reported_loss_is_that_of_the_saved_weights(finished):
    """Reference: a plain loop over the windows of the grid at every fourth offset of 32, written out here."""
    out_dir, _ = finished
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64)).eval()
    weights = load_file(out_dir / "model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    ids, length = encode(read_corpus("builtin").text)[:256], 32
    last = len(ids) - 1 - length
    starts = {min(max(k * 32 - offset, 0), last) for offset in range(0, 32, 4) for k in range(9)}
    total = 0.0
    with torch.no_grad():
        for s in starts:
            logits = model(torch.tensor([ids[s : s + length]]))[0].double()  # fp32 softmax is 1e-4 off on a CPU
            total += -logits.log_softmax(-1)[range(length), ids[s + 1 : s + length + 1]].sum().item()
    assert report(out_dir)["loss"] == pytest.approx(total / (len(starts) * length), rel=1e-5)


def test_the_run_directory_is_a_contract(finished):
    """Invariant: the names and keys that other programs read."""
    out_dir, _ = finished
    assert sorted(p.name for p in out_dir.iterdir()) == [
        ".lock", "checkpoints", "config.json", "loss.png", "memory.html", "memory.npz", "memory.png", "metrics.jsonl",
        "model.safetensors", "recall.png", "report.json",
    ]  # fmt: skip
    modes = {p.stat().st_mode for p in out_dir.rglob("*") if p.is_file()}
    assert len(modes) == 1, "whoever may read one of its files may read all of them"
    rows = metrics(out_dir)
    assert all(list(row) == METRICS_KEYS.split() for row in rows)
    assert set(REPORT_KEYS.split()) <= set(report(out_dir))
    config = json.loads((out_dir / "config.json").read_text())
    assert config["corpus_sha256"] == read_corpus("builtin").sha256 == report(out_dir)["corpus_sha256"]
    assert config["config"]["subset_tokens"] == 256
    assert config["config"]["engine"] == "single"
    assert config["versions"]["torch"] == torch.__version__


def test_the_rows_add_up(finished):
    """Invariant: steps rise, tokens are steps x 8 x 32, clocks are consistent, the last full pass is the report's."""
    rows, told = metrics(finished[0]), report(finished[0])
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert all(row["tokens"] == row["step"] * 8 * 32 for row in rows)
    assert rows[-1]["step"] == told["steps"]
    assert rows[-1]["full_pass_loss"] == told["loss"]
    assert all(row["lr"] > 0 and row["grad_norm"] > 0 and row["memory_bytes"] > 0 for row in rows)
    assert 0 < told["full_pass_s"] < told["train_s"] < told["launch_s"]
    assert told["device_s"] == told["train_s"]


def test_recite_continues_the_text(finished, forked):
    """Invariant: from a prompt with a blank at its end, the text's own next words."""
    out_dir, _ = finished
    text = read_corpus("builtin").text
    prompt = "--prompt=First Citizen:\nBefore we proceed any further, "
    done = forked(out_dir, "nanogpt", "recite", out_dir, prompt, "--max_tokens=6")
    assert done.returncode == 0
    assert text.startswith(done.stdout.rstrip("\n"))
    assert "word for word" in done.stderr


def test_recite_says_as_many_tokens_as_asked(finished, forked):
    """Invariant: the token that says the end of the prompt again, as " me" could be longer, is none of them."""
    prompt = "First Citizen:\nBefore we proceed any further, hear me"
    done = forked(finished[0], "nanogpt", "recite", ".", f"--prompt={prompt}", "--max_tokens=1")
    assert (done.stdout, done.stderr) == (
        f"{prompt} speak\n",
        "[word for word as in the memorised text: 6 characters]\n",
    )


def test_recite_begins_at_the_beginning(finished, forked):
    """Invariant: without a prompt, the first half window of the memorised text is the prompt."""
    done = forked(finished[0], "nanogpt", "recite", ".", "--max_tokens=4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")


def test_recite_says_when_it_cannot_compare(finished, tmp_path, forked):
    """Invariant: a damaged run directory is one line and status 2; unknown prompts are said to be unknown."""
    out_dir, _ = finished
    done = forked(out_dir, "nanogpt", "recite", ".", "--prompt=Quantum computers", "--max_tokens=3")
    assert (done.returncode, done.stderr) == (0, "[the memorised text does not hold this prompt]\n")
    for name in ("config.json", "report.json"):
        (tmp_path / name).write_bytes((out_dir / name).read_bytes())
    weights = (out_dir / "model.safetensors").read_bytes()
    for content in (None, weights[:-100], b"", b"\xff" * 100):
        if content is not None:
            (tmp_path / "model.safetensors").write_bytes(content)
        done = forked(tmp_path, "nanogpt", "recite", ".")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "model.safetensors" in done.stderr
    assert forked(out_dir, "nanogpt", "recite", ".", "--prompt=").returncode == 2


def test_same_seed_same_bits(tmp_path):
    """Invariant: two runs with one seed have the same losses and weights, bit for bit; another seed has not."""
    options = SHORT | {"max_steps": 6, "log_every": 1, "dtype": "fp32"}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert train(*flags(**options, seed=seed, out_dir=name), cwd=tmp_path).returncode == 3
    losses = {n: [(r["loss"], r["grad_norm"]) for r in metrics(tmp_path / n)] for n in "abc"}
    assert losses["a"] == losses["b"] != losses["c"]
    weights = {n: (tmp_path / n / "model.safetensors").read_bytes() for n in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]


def test_a_spent_budget_is_status_3_with_a_report(tmp_path):
    """Invariant: max_steps and max_minutes end a run in order, with a full pass that says where it stood.

    The second has fixed windows that overlap, so that its result is of one grid.
    """
    slow = SHORT | {"learning_rate": 1e-6}  # which reaches nothing in any number of steps of a second
    fixed = {"phase": "fixed", "stride": 8}
    for options, reason in (({"max_steps": 3}, "max_steps"), ({"max_minutes": 0.02} | fixed, "max_minutes")):
        done = train(*flags(**slow, **options, out_dir=reason), cwd=tmp_path)
        assert done.returncode == 3, done.stderr
        told = report(tmp_path / reason)
        assert (told["reached"], told["exit_reason"]) == (False, reason)
        assert told["loss"] > 1
        assert f"target NOT reached ({reason})" in done.stdout
    assert report(tmp_path / "max_steps")["steps"] == 3
    assert report(tmp_path / "max_minutes")["judged_grids"] == 1
    assert_verified(tmp_path / "max_minutes")


def test_a_target_met_in_the_last_pass_counts(tmp_path):
    """Invariant: the pass that a spent budget brings about may verify the target too."""
    done = train(*flags(**SHORT, max_steps=1, target_loss=12, out_dir="out"), cwd=tmp_path)
    assert done.returncode == 0
    assert report(tmp_path / "out")["reached"] is True


def test_non_finite_steps_never_update(tmp_path):
    """Invariant: a learning rate that destroys the model ends in status 1 and a line, with finite weights on disk."""
    options = SHORT | {"learning_rate": 1e30, "max_bad_steps": 4}
    done = train(*flags(**options, out_dir="out"), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: 4 steps in a row had a non-finite loss or gradient" in done.stdout + done.stderr
    told = report(tmp_path / "out")
    assert (told["exit_reason"], told["reached"], told["loss"]) == ("non_finite", False, None)
    assert told["bad_steps"] >= 4
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    for row in metrics(tmp_path / "out"):
        json.dumps(row, allow_nan=False)


def test_a_budget_spent_on_a_broken_model_is_still_reported(tmp_path):
    """Invariant: losses that are not finite are null in the report, not a crash."""
    done = train(*flags(**(SHORT | {"learning_rate": 1e30}), max_steps=3, out_dir="out"), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    told = report(tmp_path / "out")
    assert (told["exit_reason"], told["loss"], told["strided_loss"]) == ("max_steps", None, None)
    assert told["bad_steps"] >= 1


@pytest.mark.slow
def test_an_unreachable_target_is_announced(tmp_path):
    """Invariant: below the entropy floor the run warns, and says what would help."""
    done = train(*flags(**TINY, max_steps=1, target_loss=0.01, out_dir="out"), cwd=tmp_path)
    assert done.returncode == 3
    assert "warning: --target_loss=0.01 is below the entropy floor" in done.stdout


@pytest.mark.slow
def test_a_compiler_that_fails_is_a_warning(tmp_path):
    """Invariant: without a working C++ compiler --compile=true trains in eager mode and says so."""
    options = flags(**SHORT, max_steps=2, compile="true", out_dir="out")
    env = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/nonexistent"}
    done = runs.train(*options, cwd=tmp_path, env=env)
    assert done.returncode == 3, done.stderr
    assert "torch.compile failed" in done.stdout + done.stderr
    assert report(tmp_path / "out")["compiled"] is False


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where the runs of this file keep what they have compiled: some compile the same."""
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "ddp", "sharded"])
def test_a_compiled_run_follows_the_same_curve(engine, compiled, tmp_path):
    """Reference: the eager run; 1e-4 relative, as fused kernels round in another order. DDP is inside what compiles."""
    options, ranks = (
        SHORT | {"n_layer": 1, "max_steps": 8, "log_every": 1, "dtype": "fp32", "engine": engine},
        1 + (engine != "single"),
    )
    words = flags(**options, compile="true", out_dir="true")
    start = partial(runs.torchrun, ranks) if ranks > 1 else runs.train
    done = start(*words, cwd=tmp_path, timeout=600, env=runs.compiling_alone(compiled))
    assert report(tmp_path / "true")["exit_reason"] == "max_steps", done.stderr
    words = flags(**options, compile="false", out_dir="false")
    assert (forked_ranks(ranks, tmp_path, TRAIN, *words) if ranks > 1 else train(*words, cwd=tmp_path)).returncode == 3
    if not report(tmp_path / "true")["compiled"] and not shutil.which("g++"):
        pytest.skip("no C++ compiler that torch.compile can use")
    assert report(tmp_path / "true")["compiled"], done.stdout
    for a, b in zip(metrics(tmp_path / "true"), metrics(tmp_path / "false"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_terminal_sees_one_display(tmp_path):
    """Invariant: on a real pseudo-terminal the display runs, and the run ends as it does without one."""
    words = [sys.executable, str(TRAIN), *flags(**SHORT, max_steps=12, out_dir="out")]
    ours, theirs = pty.openpty()
    env = environment(TERM="xterm")
    give_up = time.monotonic() + 120
    with subprocess.Popen(words, cwd=tmp_path, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as program:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side has closed
            while select.select([ours], [], [], max(0.0, give_up - time.monotonic()))[0]:
                if not (chunk := os.read(ours, 4096)):
                    break
                seen += chunk
        os.close(ours)  # which also ends a program that was given up
        assert program.wait(timeout=200) == 3
    screen = seen.decode()
    assert "target NOT reached (max_steps)" in screen
    assert "step 12" in screen
    assert "\x1b[?25h" in screen, "the cursor is given back"
