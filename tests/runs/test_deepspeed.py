"""DeepSpeed as a user meets it: every ZeRO stage, its file, its launcher, and its absence."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from harness.forks import forked_ranks
from harness.lanes import slow
from harness.runs import (
    REPOSITORY,
    SHORT,
    TINY,
    TRAIN,
    assert_verified,
    compiling_alone,
    flags,
    metrics,
    report,
    run,
    torchrun,
    train,
)
from nanogpt.storage.checkpoint import newest_intact

# The running loss is below 1 after 18 steps, where averaging begins: the full pass at the end judges averaged weights.
# At a rate of 1e-2 rounding grew a hundredfold meanwhile, past any tolerance that would tell a mistake.
OPTIONS = TINY | {
    "subset_tokens": 40, "batch_size": 4, "learning_rate": 6e-3, "dtype": "fp32", "max_steps": 26, "log_every": 1,
    "on_plateau": "none", "ema": 0.5, "target_loss": 0.15,
}  # fmt: skip
IN_BF16 = {"n_layer": 1, "n_embd": 16}  # which a CPU with AVX2 alone emulates
ZERO = {"zero 2": "--zero_stage=2", "zero 3": "--zero_stage=3"}


def write(path, settings):
    """settings as the DeepSpeed file at path -> the flag that names it."""
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return f"--ds_config={path}"


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """A DDP run of two ranks: (rows, report, weights)."""
    cwd = tmp_path_factory.mktemp("ddp")
    done = forked_ranks(2, cwd, TRAIN, *flags(**OPTIONS, out_dir="out"))
    assert (cwd / "out" / "report.json").exists(), done.stderr
    saved = load_file(cwd / "out" / "checkpoints" / "step_00000026" / "rank_00000.safetensors")
    assert any("mean/" in name for name in saved), "else the tests below would compare less than they say"
    return metrics(cwd / "out"), report(cwd / "out"), load_file(cwd / "out" / "model.safetensors")


def assert_same_run(run_dir, ddp):
    """What a run left is what DDP left, up to the order of fp32 sums.

    That is 1.5e-7 in test_parity; 26 steps at six times its rate grew it to 1.4e-6 (loss), 1.1e-5 (norm) and 1.2e-6
    (strided loss) when measured, at stage 3.
    """
    rows, told, weights = ddp
    assert report(run_dir)["engine"] == "deepspeed"
    for row, expected in zip(metrics(run_dir), rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-5)
    for key in ("loss", "strided_loss", "random_offset_loss"):
        assert report(run_dir)[key] == pytest.approx(told[key], rel=1e-5), key
    assert_verified(run_dir)
    got = load_file(run_dir / "model.safetensors")
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        assert got[name].dtype == torch.float32
        if name.endswith("c_attn.bias"):  # the keys' third is rounding that Adam scales: softmax ignores it
            continue
        # Adam moves a weight by up to the rate, 6e-3, a step, whatever its gradient's size: where that is little more
        # than rounding, a hundredth of one step may differ.
        torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", ["zero 2", slow("zero 3")])
def test_a_stage_is_the_ddp_run(stage, ddp, tmp_path):
    """Reference: two DDP ranks: curve, full pass of averaged weights, recall, and every saved weight, whole.

    The engine averages, gathers and saves at stages 0 and 1 by the code of stage 2; their curves are in test_parity.
    """
    done = forked_ranks(2, tmp_path, TRAIN, "--engine=deepspeed", ZERO[stage], *flags(**OPTIONS, out_dir="out"))
    assert (tmp_path / "out" / "report.json").exists(), done.stderr
    assert_same_run(tmp_path / "out", ddp)
    assert report(tmp_path / "out")["zero_stage"] == int(stage[-1])
    resolved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert resolved["deepspeed"]["zero_optimization"]["stage"] == int(stage[-1])
    assert len(report(tmp_path / "out")["peak_memory_bytes"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_is_the_same_run(stage, ddp, tmp_path):
    """Reference: two DDP ranks; the file moves the optimizer, and at stage 3 the weights, to the CPU."""
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    words = ("--engine=deepspeed", write(tmp_path / "ds.json", {"zero_optimization": zero}))
    done = forked_ranks(2, tmp_path, TRAIN, *words, *flags(**OPTIONS, out_dir="out"))
    assert (tmp_path / "out" / "report.json").exists(), done.stderr
    assert_same_run(tmp_path / "out", ddp)


@pytest.mark.slow
def test_what_was_judged_is_saved_with_weights_in_bf16(tmp_path):
    """Invariant: the saved weights are the bf16 ones that the full pass read, the checkpoint's are the fp32 masters.

    That the masters keep the curve is shown in test_parity.
    """
    settings = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    words = ("--engine=deepspeed", write(tmp_path / "ds.json", settings))
    options = SHORT | IN_BF16 | {"max_steps": 4}
    done = forked_ranks(2, tmp_path, TRAIN, *words, *flags(**options, out_dir="out"))
    told = report(tmp_path / "out")
    assert (told["dtype"], told["steps"]) == ("bf16", 4), done.stderr
    checkpoint, _ = newest_intact(tmp_path / "out")
    rounded = 0
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        master = checkpoint.read(f"weight/{name}", 0, weight.numel()).view_as(weight)
        assert torch.equal(weight, weight.bfloat16().float()), name
        assert torch.equal(weight, master.bfloat16().float()), name
        rounded += (weight != master).sum().item()
    assert rounded > 0, "the masters hold more than bf16"
    assert told["scores_precision"] == "bf16 weights"
    assert_verified(tmp_path / "out")


@pytest.mark.slow
def test_zero_3_in_bf16_states_what_it_can(tmp_path):
    """Invariant: where the weights are gathered in bf16 the scores say so, and one process finds them again."""
    options = SHORT | IN_BF16 | {"max_steps": 2, "dtype": "bf16"}
    words = ("--engine=deepspeed", "--zero_stage=3", *flags(**options, out_dir="out"))
    done = forked_ranks(2, tmp_path, TRAIN, *words)
    assert (tmp_path / "out" / "report.json").exists(), done.stderr
    assert report(tmp_path / "out")["scores_precision"] == "bf16"
    assert_verified(tmp_path / "out")


@pytest.mark.slow
def test_zero_3_reaches_a_target_and_recites(tmp_path, forked):
    """Invariant: two ranks that share the weights out reach a verified target; another program recites from it.

    The text is one window: in a full pass the second rank has none, and must gather the weights all the same.
    """
    options = TINY | {"subset_tokens": 33, "batch_size": 2, "dtype": "fp32", "max_steps": 300}
    words = ("--engine=deepspeed", "--zero_stage=3", *flags(**options, out_dir="out"))
    done = forked_ranks(2, tmp_path, TRAIN, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tmp_path / "out")["reached"] is True
    said = forked(tmp_path, "nanogpt", "recite", "out", "--max_tokens=16")
    assert (said.returncode, "[word for word" in said.stderr) == (0, True), said.stderr


@pytest.mark.slow
def test_one_process_needs_no_launcher(tmp_path):
    """Invariant: python train_overfit.py --engine=deepspeed runs alone, without DeepSpeed's noise or compiled ops."""
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    words = ("--engine=deepspeed", *flags(**(OPTIONS | {"max_steps": 2}), out_dir="out"))
    done = train(*words, cwd=tmp_path, env=env)
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    assert "[WARNING]" not in done.stdout
    assert not (tmp_path / "built").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_compile_works_or_warns(stage, tmp_path):
    """Invariant: ZeRO 2 trains a compiled model, ZeRO 3 says in one line that it cannot; neither crashes."""
    words = ("--engine=deepspeed", f"--zero_stage={stage}", "--compile=true")
    words += (*flags(**(OPTIONS | {"n_layer": 1, "max_steps": 2}), out_dir="out"),)
    done = torchrun(2, *words, cwd=tmp_path, timeout=600, env=compiling_alone(tmp_path))
    told = report(tmp_path / "out")
    warned = done.stdout.count("going on without torch.compile")
    if stage == 2 and warned and not shutil.which("g++"):
        pytest.skip("no C++ compiler that torch.compile can use")
    assert (told["compiled"], warned) == ((True, 0) if stage == 2 else (False, 1)), done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--zero_stage=2"], "works with --engine=deepspeed only"),
        (["--ds_config=ds_config.json"], "works with --engine=deepspeed only"),
        (["--engine=deepspeed", "--zero_stage=4"], "from 0 to 3"),
        (["--engine=deepspeed", "--ds_config=nowhere.json"], "No such file"),
        (["--engine=deepspeed", f"--ds_config={REPOSITORY / 'pyproject.toml'}"], "is not JSON"),
        (["--engine=deepspeed", "--micro_batch_size=3"], "must divide the 16 windows"),
        (["--local_rank=0"], "unknown option --local_rank"),
        (["--local_rank="], "unknown option --local_rank"),
    ],
)
def test_options_that_cannot_work_are_one_line(words, said, tmp_path, forked):
    """Invariant: exit status 2 and one line, as for any other option."""
    done = forked(tmp_path, TRAIN, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("shadow", "said"),
    [
        ("raise ImportError('none')", "pip install deepspeed, or '.[deepspeed]' in a checkout"),
        ("raise RuntimeError('no CUDA_HOME')", "cannot be imported"),
        (
            "import sys; __version__ = '0.14.2'; __path__ = []; sys.modules['deepspeed.ops'] = sys",
            "needs DeepSpeed 0.19.8, not 0.14.2",
        ),
    ],
)
def test_without_deepspeed_the_rest_works(shadow, said, tmp_path, forked):
    """Invariant: the one engine that needs it says how to get it, with status 2; the others never import it."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "deepspeed.py").write_text(shadow)
    env = {"PYTHONPATH": str(tmp_path / "shadow")}
    done = forked(tmp_path, TRAIN, "--engine=deepspeed", **env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    if "RuntimeError" in shadow:  # which importing it would not survive
        assert forked(tmp_path, TRAIN, *flags(**SHORT, max_steps=1, out_dir="out"), **env).returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["deepspeed.sh"], ["torchrun.sh", "--engine=deepspeed"]], ids=["deepspeed", "torchrun"]
)
def test_the_launchers_start_two_ranks(words, ddp, tmp_path):
    """Reference: the first steps of two DDP ranks. The deepspeed launcher adds --local_rank to each rank's words."""
    if words[0] == "deepspeed.sh" and torch.cuda.is_available():
        pytest.skip("the deepspeed launcher shows the ranks the GPUs that this suite hides")
    here = os.path.dirname(sys.executable)
    env = {"NGPU": "2", "OMP_NUM_THREADS": "1", "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    script, *words = words
    words += flags(**OPTIONS | {"max_steps": 4}, out_dir="out")
    done = run(REPOSITORY / "launch" / script, *words, cwd=tmp_path, env=env)
    assert (tmp_path / "out" / "report.json").exists(), done.stdout + done.stderr
    assert (report(tmp_path / "out")["world_size"], report(tmp_path / "out")["engine"]) == (2, "deepspeed")
    for row, expected in zip(metrics(tmp_path / "out"), ddp[0][:4], strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((expected["loss"], expected["grad_norm"]), rel=1e-5)


def test_a_hostfile_must_be_there(tmp_path):
    """Invariant: DeepSpeed itself would train on this node alone."""
    done = run(REPOSITORY / "launch" / "deepspeed.sh", cwd=tmp_path, env={"HOSTFILE": "typo"})
    assert (done.returncode, done.stderr) == (2, "error: HOSTFILE=typo: no such file\n")


def test_several_nodes_need_an_address(tmp_path):
    """Invariant: launch/torchrun.sh says which variable a run of several nodes lacks, before anything starts."""
    done = run(REPOSITORY / "launch" / "torchrun.sh", cwd=tmp_path, env={"NNODES": "2", "NODE_RANK": "0"})
    assert done.returncode != 0
    assert "MASTER_ADDR" in done.stderr
    assert done.stderr.count("\n") == 1
