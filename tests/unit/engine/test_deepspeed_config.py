"""A DeepSpeed file: what it means, and what cannot work is one line."""

import json

import pytest

from harness.runs import ALONE, SHORT
from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import TrainConfig
from nanogpt.engine.deepspeed_config import DEFAULT_PATH, dtype_of, read_ds_config
from nanogpt.plan.plan import make_plan


def write(path, settings):
    """settings as the DeepSpeed file at path -> the flag that names it."""
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return f"--ds_config={path}"


RESOLVED = {
    "zero_stage": None, "dtype": "auto", "best_dtype": "bf16", "micro_batch_size": 8, "accumulation_steps": 1,
    "device_type": "cpu",
}  # fmt: skip


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


def test_dtype_goes_before_the_file(tmp_path):
    """Invariant: the file says how bf16 is done, --dtype=fp32 that it is not; so the plan has it."""
    write(tmp_path / "ds.json", {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}})
    plan = make_plan(TrainConfig(engine="deepspeed", ds_config=str(tmp_path / "ds.json"), dtype="fp32", **SHORT), ALONE)
    assert plan.config.dtype == "fp32"
    assert plan.deepspeed["bf16"]["enabled"] is plan.deepspeed["torch_autocast"]["enabled"] is False


def test_the_projects_own_file_is_valid():
    """Invariant: ds_config.json passes DeepSpeed's validation at every stage, and means autocast on fp32 weights."""
    for stage in (None, 0, 1, 2, 3):
        settings = read_ds_config(str(DEFAULT_PATH), **(RESOLVED | {"zero_stage": stage}))
        assert settings["zero_optimization"]["stage"] == (2 if stage is None else stage)
        assert (settings["torch_autocast"]["enabled"], settings["bf16"]["enabled"]) == (True, False)
        assert settings["gradient_clipping"] == 0.0
