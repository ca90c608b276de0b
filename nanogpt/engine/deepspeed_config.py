"""DeepSpeed's configuration: policy from a file, the run's own decisions from TrainConfig, put together in one place.

settings = read_ds_config("ds_config.json", zero_stage=None, dtype="auto", best_dtype="bf16", micro_batch_size=8,
                          accumulation_steps=1, device_type="cuda")

Whatever would leave DDP's curve, or would be ignored without a word, is refused.
"""

import copy
import difflib
import os
import pydoc
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from nanogpt.config.errors import ConfigError, one_line
from nanogpt.config.files import read_file
from nanogpt.storage.json_file import parse_json

DEFAULT_PATH = Path(__file__).resolve().parent.parent / "assets" / "ds_config.json"
OLDEST = (0, 19, 8)  # DeepSpeed

# What TrainConfig decides, the option that does, and the value that says no more than it.
OURS = {
    "train_batch_size": ("--batch_size", None),
    "train_micro_batch_size_per_gpu": ("--micro_batch_size", None),
    "gradient_accumulation_steps": ("--micro_batch_size", None),
    "gradient_clipping": ("the recipe, which clips nothing,", 0.0),
    "optimizer": ("the recipe", None),
    "scheduler": ("--on_plateau", None),
    "fp16": ("--dtype, which has no fp16,", {"enabled": False}),
    "compile": ("--compile", None),
}
# What this trainer passes on, and of the sections that DeepSpeed itself does not check, the names.
LOGGING = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler")
POLICY = ("zero_optimization", "bf16", "torch_autocast", "communication_data_type", *LOGGING)
UNCHECKED = {
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "flops_profiler": (
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file",
    ),
}  # fmt: skip
# The one value that works here, and why.
FIXED = {
    "zero_optimization.compute_grad_norm": (True, "a step whose gradient norm is unknown cannot be checked"),
    "zero_optimization.zero_quantized_weights": (False, "rounded weights leave DDP's curve"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "rounded weights leave DDP's curve"),
    "zero_optimization.zero_quantized_gradients": (False, "rounded gradients leave DDP's curve"),
    "zero_optimization.zero_hpz_partition_size": (1, "its second copy hides the averaged weights"),
    "zero_optimization.zenflow": (None, "late updates leave DDP's curve"),
    "zero_optimization.round_robin_gradients": (False, "DeepSpeed then mistakes which rank holds what of a checkpoint"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed has dropped it"),
    "zero_optimization.cpu_offload": (False, "it is now called offload_optimizer"),
    "zero_optimization.cpu_offload_param": (False, "it is now called offload_param"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "part of an optimizer cannot be offloaded"),
    "zero_optimization.offload_optimizer.super_offload": (False, "it brings an optimizer of its own"),
    "bf16.bf16_master_weights_and_grads": (False, "the master weights stay in fp32"),
    "bf16.bf16_optimizer_states": (False, "the optimizer's state stays in fp32"),
    "bf16.check_grad_overflow": (True, "a non-finite step must not reach the weights"),
}


def import_deepspeed(device_type: str) -> ModuleType:
    """DeepSpeed for 'cuda' or 'cpu', without what its start says and builds that nobody can use. Raises ConfigError."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)  # else it warns that it found no GPU
    # torch says so of what DeepSpeed calls, several times a step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"--engine=deepspeed needs DeepSpeed ({error}): pip install deepspeed, or '.[deepspeed]' in a checkout"
        ) from None
    except Exception as error:  # it looks for devices and compilers when imported
        raise ConfigError(f"DeepSpeed cannot be imported: {type(error).__name__}: {one_line(error)}") from None
    if tuple(map(int, re.findall(r"\d+", deepspeed.__version__)[:3])) < OLDEST:
        # Older ones apply a non-finite gradient to fp32 weights.
        raise ConfigError(
            f"--engine=deepspeed needs DeepSpeed {'.'.join(map(str, OLDEST))}, not {deepspeed.__version__}"
        )
    if device_type == "cpu":
        # A shared-memory collective for inference: it would be compiled at the first run, which takes a minute and a
        # C++ compiler, under a lock that a killed run leaves for the next one to wait on.
        deepspeed.ops.__compatible_ops__ = {}
    module: ModuleType = deepspeed
    return module


def read_ds_config(
    path: str,
    *,
    zero_stage: int | None,
    dtype: str,
    best_dtype: str,
    micro_batch_size: int,
    accumulation_steps: int,
    device_type: str,
) -> dict[str, Any]:
    """The configuration for deepspeed.initialize, validated by DeepSpeed too. Raises ConfigError.

    zero_stage, unless None, and dtype, unless 'auto', go before what the file says; with dtype 'auto', and no kind of
    bf16 enabled or disabled in the file, best_dtype decides. DeepSpeed's "bf16" keeps the weights themselves in bf16,
    with fp32 masters; "torch_autocast", the default kind, computes in bf16 on fp32 weights, as the other engines do.
    """
    settings = _read(path)
    _check_names(path, settings)
    for name in _left_to_others(settings):
        raise ConfigError(
            f"--ds_config={path}: {name} is 'auto', for another trainer to fill in: give a value, or take it out"
        )
    zero = settings.setdefault("zero_optimization", {})
    stage = zero["stage"] = zero.get("stage", 0) if zero_stage is None else zero_stage
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"--ds_config={path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    _check_values(path, settings)
    _set_precision(path, settings, dtype, best_dtype)
    settings |= {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,  # Muon; tests/runs/test_parity.py tests it
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps offloaded state too, without a C++ build
    }
    _check_by_deepspeed(path, settings, device_type)
    return settings


def dtype_of(settings: dict[str, Any]) -> str:
    """'bf16' or 'fp32': what a resolved configuration computes in."""
    return "bf16" if any(settings.get(name, {}).get("enabled") for name in ("bf16", "torch_autocast")) else "fp32"


def _read(path: str) -> dict[str, Any]:
    try:
        settings = parse_json(read_file(Path(path)), make_object=_without_duplicates)
    except OSError as error:
        raise ConfigError(f"--ds_config={path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"--ds_config={path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"--ds_config={path} must hold a JSON object")
    return settings


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands twice")
    return dict(pairs)


def _check_names(path: str, settings: dict[str, Any]) -> None:
    for name, value in list(settings.items()):
        if name in OURS:
            option, harmless = OURS[name]
            if value != harmless:
                raise ConfigError(f"--ds_config={path} sets {name!r}, which {option} decides: take it out of the file")
            del settings[name]
            continue
        _check_name(path, name, POLICY)
        if name in ("zero_optimization", "bf16", *UNCHECKED) and not isinstance(value, dict):
            raise ConfigError(f"--ds_config={path}: {name!r} must hold a JSON object")
    for section, known in UNCHECKED.items():
        for name in settings.get(section, ()):
            _check_name(path, name, known)


def _check_name(path: str, name: str, known: Sequence[str]) -> None:
    """DeepSpeed ignores what it does not know; here it is refused."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}"
        raise ConfigError(f"--ds_config={path}: {name!r} is not a setting that this trainer passes on: {hint}")


def _left_to_others(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The settings that are 'auto', which DeepSpeed itself drops from some sections and computes with in others."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _left_to_others(value, f"{prefix}{name}.")
        elif value == "auto":
            yield prefix + name


def _check_values(path: str, settings: dict[str, Any]) -> None:
    for section in ("bf16", "torch_autocast"):
        if not isinstance(settings.get(section, {}).get("enabled", False), bool):
            raise ConfigError(f"--ds_config={path}: {section}.enabled must be true or false")
    every = settings.get("steps_per_print")
    if every is not None and (type(every) is not int or every < 1):
        raise ConfigError(f"--ds_config={path}: steps_per_print must be a positive whole number, not {every!r}")
    for name, (works, why) in FIXED.items():
        *sections, last = name.split(".")
        within: Any = settings
        for section in sections:
            within = within.get(section) if isinstance(within, dict) else None
        if isinstance(within, dict) and within.get(last, works) != works:
            raise ConfigError(f"--ds_config={path}: {name} cannot work here: {why}")
    zero = settings["zero_optimization"]
    for name, stages, needed in (("offload_optimizer", (1, 2, 3), "1 to 3"), ("offload_param", (3,), "3")):
        device = zero[name].get("device", "none") if isinstance(zero.get(name), dict) else "none"
        if device == "nvme":
            raise ConfigError(f"--ds_config={path}: zero_optimization.{name} to nvme cannot work here: offload to cpu")
        if device == "cpu" and zero["stage"] not in stages:
            raise ConfigError(
                f"--ds_config={path}: zero_optimization.{name} does nothing at stage {zero['stage']}: it needs stage "
                f"{needed}"
            )


def _set_precision(path: str, settings: dict[str, Any], dtype: str, best_dtype: str) -> None:
    """Switch one of the two kinds of bf16 on, or both off."""
    native = settings.setdefault("bf16", {})
    autocast = settings.setdefault("torch_autocast", {})
    if native.get("enabled") and autocast.get("enabled"):
        raise ConfigError(f"--ds_config={path} enables both bf16 and torch_autocast: choose one")
    if autocast.setdefault("dtype", "bfloat16") != "bfloat16":
        raise ConfigError(f"--ds_config={path}: torch_autocast.dtype must be 'bfloat16', not {autocast['dtype']!r}")
    if dtype == "auto":
        said = True if native.get("enabled") else autocast.get("enabled")
        dtype = best_dtype if said is None else "bf16" if said else "fp32"
    native["enabled"] = dtype == "bf16" and native.get("enabled", False)
    autocast["enabled"] = dtype == "bf16" and not native["enabled"]
    if native["enabled"] and settings["zero_optimization"]["stage"] == 0:
        raise ConfigError(
            f"--ds_config={path}: bf16 at stage 0 does not follow DDP's curve: enable torch_autocast instead, or "
            f"--zero_stage=1"
        )
    if autocast["enabled"] and settings["zero_optimization"]["stage"] > 0 and "communication_data_type" in settings:
        raise ConfigError(
            f"--ds_config={path}: DeepSpeed ignores communication_data_type under torch_autocast from stage 1 on: "
            f"lower_precision_safe_modules says there what may travel in bf16"
        )
    # DeepSpeed's default would add up the ranks' gradients in bf16.
    classes = autocast.setdefault("lower_precision_safe_modules", [])
    if not isinstance(classes, list) or not all(map(_names_a_class, classes)):
        raise ConfigError(
            f"--ds_config={path}: torch_autocast.lower_precision_safe_modules must list classes, as 'torch.nn.Linear'"
        )


def _names_a_class(name: Any) -> bool:
    return isinstance(name, str) and "." in name and isinstance(pydoc.locate(name), type)


def _check_by_deepspeed(path: str, settings: dict[str, Any], device_type: str) -> None:
    import_deepspeed(device_type)
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except Exception as error:  # pydantic's, its own and bare assertions
        raise ConfigError(f"--ds_config={path}: {one_line(error, with_input=True)}") from None
