"""DeepSpeed as a user meets it: every ZeRO stage, its file, its launcher, and its absence."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from harness.runs import (
    ALONE,
    REPOSITORY,
    SHORT,
    TINY,
    TRAIN,
    assert_verified,
    flags,
    metrics,
    report,
    run,
    torchrun,
    train,
)
from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.engine.deepspeed_config import DEFAULT_PATH, dtype_of, read_ds_config
from nanogpt.plan.plan import make_plan
from nanogpt.storage.checkpoint import newest_intact

# The running loss is below 1 after 18 steps, where averaging begins: the full pass at the end judges averaged weights.
# At a rate of 1e-2 rounding grew a hundredfold meanwhile, past any tolerance that would tell a mistake.
OPTIONS = TINY | {
    "subset_tokens": 40, "batch_size": 4, "learning_rate": 6e-3, "dtype": "fp32", "max_steps": 26, "log_every": 1,
    "on_plateau": "none", "ema": 0.5, "target_loss": 0.15,
}  # fmt: skip
ZERO = {"zero 0": "--zero_stage=0", "zero 1": "--zero_stage=1", "zero 2": "--zero_stage=2", "zero 3": "--zero_stage=3"}

RESOLVED = {
    "zero_stage": None, "dtype": "auto", "best_dtype": "bf16", "micro_batch_size": 8, "accumulation_steps": 1,
    "device_type": "cpu",
}  # fmt: skip


def write(path, settings):
    """settings as the DeepSpeed file at path -> the flag that names it."""
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return f"--ds_config={path}"


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """A DDP run of two ranks: (rows, report, weights)."""
    cwd = tmp_path_factory.mktemp("ddp")
    done = torchrun(2, *flags(**OPTIONS, out_dir="out"), cwd=cwd)
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


@pytest.mark.parametrize("stage", ZERO)
def test_every_stage_is_the_ddp_run(stage, ddp, tmp_path):
    """Reference: two DDP ranks: curve, full pass of averaged weights, recall, and every saved weight, whole."""
    done = torchrun(2, "--engine=deepspeed", ZERO[stage], *flags(**OPTIONS, out_dir="out"), cwd=tmp_path)
    assert (tmp_path / "out" / "report.json").exists(), done.stderr
    assert_same_run(tmp_path / "out", ddp)
    assert report(tmp_path / "out")["zero_stage"] == int(stage[-1])
    resolved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert resolved["deepspeed"]["zero_optimization"]["stage"] == int(stage[-1])
    assert len(report(tmp_path / "out")["peak_memory_bytes"]) == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_is_the_same_run(stage, ddp, tmp_path):
    """Reference: two DDP ranks; the file moves the optimizer, and at stage 3 the weights, to the CPU."""
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    words = ("--engine=deepspeed", write(tmp_path / "ds.json", {"zero_optimization": zero}))
    done = torchrun(2, *words, *flags(**OPTIONS, out_dir="out"), cwd=tmp_path)
    assert (tmp_path / "out" / "report.json").exists(), done.stderr
    assert_same_run(tmp_path / "out", ddp)


def test_what_was_judged_is_saved_with_weights_in_bf16(tmp_path):
    """Invariant: the saved weights are the bf16 ones that the full pass read, the checkpoint's are the fp32 masters.

    That the masters keep the curve is shown in test_parity.
    """
    settings = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    words = ("--engine=deepspeed", write(tmp_path / "ds.json", settings))
    options = SHORT | {"max_steps": 4}
    done = torchrun(2, *words, *flags(**options, out_dir="out"), cwd=tmp_path, timeout=600)
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


def test_zero_3_in_bf16_states_what_it_can(tmp_path):
    """Invariant: where the weights are gathered in bf16 the scores say so, and one process finds them again."""
    options = SHORT | {"max_steps": 2, "dtype": "bf16"}
    words = ("--engine=deepspeed", "--zero_stage=3", *flags(**options, out_dir="out"))
    done = torchrun(2, *words, cwd=tmp_path)
    assert (tmp_path / "out" / "report.json").exists(), done.stderr
    assert report(tmp_path / "out")["scores_precision"] == "bf16"
    assert_verified(tmp_path / "out")


def test_zero_3_reaches_a_target_and_recites(tmp_path):
    """Invariant: two ranks that share the weights out reach a verified target; another program recites from it.

    The text is one window: in a full pass the second rank has none, and must gather the weights all the same.
    """
    options = TINY | {"subset_tokens": 33, "batch_size": 2, "dtype": "fp32", "max_steps": 300}
    words = ("--engine=deepspeed", "--zero_stage=3", *flags(**options, out_dir="out"))
    done = torchrun(2, *words, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tmp_path / "out")["reached"] is True
    said = run(sys.executable, "-m", "nanogpt", "recite", "out", "--max_tokens=16", cwd=tmp_path)
    assert (said.returncode, "[verbatim" in said.stderr) == (0, True), said.stderr


def test_one_process_needs_no_launcher(tmp_path):
    """Invariant: python train_overfit.py --engine=deepspeed runs alone, without DeepSpeed's noise or compiled ops."""
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    words = ("--engine=deepspeed", *flags(**(OPTIONS | {"max_steps": 2}), out_dir="out"))
    done = train(*words, cwd=tmp_path, env=env)
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    assert "[WARNING]" not in done.stdout
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_compile_works_or_warns(stage, tmp_path):
    """Invariant: ZeRO 2 trains a compiled model, ZeRO 3 says in one line that it cannot; neither crashes."""
    words = ("--engine=deepspeed", f"--zero_stage={stage}", "--compile=true")
    done = torchrun(
        2, *words, *flags(**(OPTIONS | {"n_layer": 1, "max_steps": 2}), out_dir="out"), cwd=tmp_path, timeout=600
    )
    told = report(tmp_path / "out")
    warned = done.stdout.count("going on without torch.compile")
    if stage == 2 and warned and not shutil.which("g++"):
        pytest.skip("no C++ compiler that torch.compile can use")
    assert (told["compiled"], warned) == ((True, 0) if stage == 2 else (False, 1)), done.stdout


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' stands twice"),
        ({"zero_optimization": {"stage": 4}}, "stage must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "stage must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stge": 2}}, "stge"),
        ({"zero_optimization": 2}, "must hold a JSON object"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size is"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": "auto"}}},
            "zero_optimization.offload_param.pin_memory is 'auto'",
        ),
        ({"communication_data_type": "auto"}, "communication_data_type is 'auto'"),
        ({"optimizer": {"type": "Adam"}}, "take it out of the file"),
        ({"gradient_clipping": 1.0}, "take it out of the file"),
        ({"train_micro_batch_size_per_gpu": 4}, "--micro_batch_size decides"),
        ({"gradient_accumulation_steps": 4}, "--micro_batch_size decides"),
        ({"fp16": {"enabled": True}}, "no fp16"),
        ({"bf16": {"enabled": True}}, "bf16 at stage 0 does not follow"),
        ({"bf16": {"enabled": "yes"}}, "must be true or false"),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "choose one"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "must be 'bfloat16'"),
        ({"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["no.such"]}}, "must list classes"),
        ({"torch_autocast": {"enable": True}}, "did you mean 'enabled'"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "does nothing at stage 0"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "does nothing at stage 2"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload to cpu"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "rounded weights leave DDP's curve"),
        ({"communication_data_type": "int7"}, "Invalid communication_data_type"),
        ({"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}, "ignores communication_data_type"),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "has dropped it"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "offload_optimizer"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "ratio cannot work",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}},
            "super_offload cannot",
        ),
        ({"torch_autocast": {"lower_precision_safe_modules": ["int"]}}, "must list classes"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "which rank holds what of a checkpoint"),
        ({"steps_per_print": "often"}, "positive whole number"),
        ({"steps_per_print": 0}, "positive whole number"),
        ({"flops_profiler": {"enable": True}}, "did you mean 'enabled'"),
    ],
)
def test_a_file_that_cannot_work_is_one_line(settings, said, tmp_path):
    """Invariant: refused in one line that names the file and the mistake."""
    write(tmp_path / "ds.json", settings)
    with pytest.raises(ConfigError) as refusal:
        read_ds_config(str(tmp_path / "ds.json"), **RESOLVED)
    assert said in str(refusal.value)
    assert str(tmp_path / "ds.json") in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("zero", [{"stage": 3}, {"stage": 1, "offload_optimizer": {"device": "cpu"}}])
def test_muon_needs_whole_matrices(zero, tmp_path):
    """Invariant: what would leave Muon without its matrices is refused in one line."""
    write(tmp_path / "ds.json", {"zero_optimization": zero})
    with pytest.raises(ConfigError, match="--optimizer=muon needs whole matrices"):
        make_plan(TrainConfig(engine="deepspeed", ds_config=str(tmp_path / "ds.json"), recipe="fast"), ALONE)


def test_what_a_files_values_mean(tmp_path):
    """Invariant: explicit switches are obeyed, harmless settings accepted, and the rest is up to the device."""

    def settle(settings, **resolved):
        write(tmp_path / "ds.json", settings)
        return read_ds_config(str(tmp_path / "ds.json"), **(RESOLVED | resolved))

    assert dtype_of(settle({}, best_dtype="bf16")) == "bf16"
    assert dtype_of(settle({}, best_dtype="fp32")) == "fp32"
    assert dtype_of(settle({"torch_autocast": {"enabled": True}}, best_dtype="fp32")) == "bf16"
    assert dtype_of(settle({"torch_autocast": {"enabled": False}}, best_dtype="bf16")) == "fp32"
    native = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    assert settle(native)["torch_autocast"]["enabled"] is False
    assert dtype_of(settle(native, dtype="fp32")) == "fp32"
    usual = {"gradient_clipping": 0.0, "fp16": {"enabled": False}, "steps_per_print": 100, "wall_clock_breakdown": True}
    assert settle(usual)["steps_per_print"] == 100


def test_the_projects_own_file_is_valid():
    """Invariant: ds_config.json passes DeepSpeed's validation at every stage, and means autocast on fp32 weights."""
    for stage in (None, 0, 1, 2, 3):
        settings = read_ds_config(str(DEFAULT_PATH), **(RESOLVED | {"zero_stage": stage}))
        assert settings["zero_optimization"]["stage"] == (2 if stage is None else stage)
        assert (settings["torch_autocast"]["enabled"], settings["bf16"]["enabled"]) == (True, False)
        assert settings["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--zero_stage=2"], "--engine=deepspeed alone"),
        (["--ds_config=ds_config.json"], "--engine=deepspeed alone"),
        (["--engine=deepspeed", "--zero_stage=4"], "from 0 to 3"),
        (["--engine=deepspeed", "--ds_config=nowhere.json"], "No such file"),
        (["--engine=deepspeed", f"--ds_config={REPOSITORY / 'pyproject.toml'}"], "is not JSON"),
        (["--engine=deepspeed", "--micro_batch_size=3"], "does not divide the 16 windows"),
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


def test_dtype_goes_before_the_file(tmp_path):
    """Invariant: the file says how bf16 is done, --dtype=fp32 that it is not; config.json holds what came of it."""
    settings = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    words = ("--engine=deepspeed", write(tmp_path / "ds.json", settings))
    done = train(*words, *flags(**(OPTIONS | {"max_steps": 1}), out_dir="out"), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    resolved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert resolved["config"]["dtype"] == "fp32"
    assert resolved["deepspeed"]["bf16"]["enabled"] is resolved["deepspeed"]["torch_autocast"]["enabled"] is False


@pytest.mark.parametrize(
    ("shadow", "said"),
    [
        ("raise ImportError('none')", "pip install '.[deepspeed]'"),
        ("raise RuntimeError('no CUDA_HOME')", "cannot be imported"),
        (
            "import sys; __version__ = '0.14.2'; __path__ = []; sys.modules['deepspeed.ops'] = sys",
            "needs DeepSpeed 0.19.8, not 0.14.2",
        ),
    ],
)
def test_without_deepspeed_the_rest_works(shadow, said, tmp_path):
    """Invariant: the one engine that needs it says how to get it, with status 2; the others never import it."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "deepspeed.py").write_text(shadow)
    env = {"PYTHONPATH": f"{tmp_path / 'shadow'}{os.pathsep}{REPOSITORY}"}
    done = train("--engine=deepspeed", cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    if "RuntimeError" in shadow:  # which importing it would not survive
        assert train(*flags(**SHORT, max_steps=1, out_dir="out"), cwd=tmp_path, env=env).returncode == 3


@pytest.mark.parametrize(
    "words", [["deepspeed.sh"], ["torchrun.sh", "--engine=deepspeed"]], ids=["deepspeed", "torchrun"]
)
def test_the_launchers_start_two_ranks(words, ddp, tmp_path):
    """Reference: two DDP ranks. The deepspeed launcher adds --local_rank to each rank's words."""
    if words[0] == "deepspeed.sh" and torch.cuda.is_available():
        pytest.skip("the deepspeed launcher shows the ranks the GPUs that this suite hides")
    here = os.path.dirname(sys.executable)
    env = {"NGPU": "2", "OMP_NUM_THREADS": "1", "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    script, *words = words
    words += flags(**OPTIONS, out_dir="out")
    done = run(REPOSITORY / "launch" / script, *words, cwd=tmp_path, env=env)
    assert (tmp_path / "out" / "report.json").exists(), done.stdout + done.stderr
    assert report(tmp_path / "out")["world_size"] == 2
    assert_same_run(tmp_path / "out", ddp)


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
