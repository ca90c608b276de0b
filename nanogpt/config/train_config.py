"""One frozen, documented, validated configuration of a training run.

    >>> TrainConfig(subset_tokens=4096, max_steps=100).batch_size
    16

This module imports no torch, so a wrong option is refused in a fraction of a second.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from nanogpt.config.errors import ConfigError
from nanogpt.config.fault import Fault
from nanogpt.config.options import LARGEST, Options, option, option_types, require_positive

MOST_WINDOWS = 2**20  # in a batch: each has its place in a list
DEFAULT_SUBSET_TOKENS = 2048  # memorised in under half an hour on 2 CPU cores: docs/explanation/memorising.md

text_option = partial(option, group="Text")
model_option = partial(option, group="Model")
recipe_option = partial(option, group="Recipe")
stop_option = partial(option, group="When to stop", may_change=True)
machine_option = partial(option, group="Machine", may_change=True)
output_option = partial(option, group="Output", may_change=True, shapes_curve=False)
wandb_option = partial(option, group="Weights & Biases", may_change=True, shapes_curve=False)


@dataclass(frozen=True)
class TrainConfig(Options):
    """What a run is. Two runs with the same TrainConfig on the same text follow the same curve."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # By heart within a minute on two CPU cores without bf16, starts and scores included (benchmarks/LOG.md).
        "demo": {
            "n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 32, "context_length": 32, "subset_tokens": 512,
            "batch_size": 8, "recipe": "fast", "target_recall": 1.0, "log_every": 2, "out_dir": "demo",
        },
    }  # fmt: skip

    data: str = text_option(
        "builtin",
        "builtin (scenes of Coriolanus), tinyshakespeare (downloaded once), a UTF-8 file, a directory, whose *.txt "
        "files are read in order of their names, or several of these with commas between",
        may_change=True,
    )
    subset_tokens: int | None = text_option(
        None, f"memorise the first N tokens; none: {DEFAULT_SUBSET_TOKENS}, or the whole of a shorter text", "tokens"
    )
    context_length: int = text_option(64, "length of a training window", "tokens")
    stride: int | None = text_option(None, "distance between the windows of one epoch; none: context_length", "tokens")
    phase: Literal["random", "fixed"] = text_option("random", "random: shift all windows each epoch; fixed: never")
    n_layer: int = model_option(16, "transformer blocks", "blocks")
    n_head: int = model_option(12, "attention heads", "heads")
    n_embd: int = model_option(768, "width of the residual stream", "channels")
    block_size: int = model_option(1024, "learned positions; the longest possible context_length", "tokens")
    init_from: str | None = model_option(
        None, "directory of a GPT-2 saved by transformers, whose shape and weights to start with; none: random weights"
    )
    batch_size: int = recipe_option(16, "windows in a global batch, whatever the number of ranks", "windows")
    micro_batch_size: int | None = recipe_option(
        None, "most windows a rank holds at once, to bound memory; none: all its share", "windows", may_change=True
    )
    recipe: Literal["reference", "fast"] = recipe_option(
        "reference",
        "reference: AdamW at a rate that is constant until near the target; fast: Muon beside it",
    )
    optimizer: Literal["auto", "adamw", "muon"] = recipe_option(
        "auto", "auto: the recipe's; muon: Muon on the blocks' matrices, AdamW on the rest"
    )
    learning_rate: float | None = recipe_option(
        None,
        "learning rate before it decays; beside Muon, AdamW's is 16 x that for the position embedding and 0.6 x for "
        "the rest; none: 6e-4 (adamw) or 1e-3 x sqrt(768 / n_embd) (muon)",
    )
    on_plateau: Literal["decay", "none"] = recipe_option(
        "decay",
        "decay: below a loss of 8 x target_loss (muon: 4 x), 1 nat/token at most, the learning rate falls with the "
        "square root of the loss; none: it stays constant",
    )
    ema: float = recipe_option(
        0.97,
        "full passes evaluate an exponential moving average of the weights, over 1 / (1 - ema) steps, once the first "
        "weights in it make up a quarter of it at most; 0: they evaluate the current weights",
    )
    seed: int = recipe_option(0, "seeds weights and window order")
    target_loss: float = stop_option(
        0.099, "stop when a full pass over the subset verifies this mean loss", "nats/token", may_change=False
    )
    target_recall: float | None = stop_option(
        None,
        "and until it brings back this share of its windows exactly, each from its first half; 1: by heart, the whole "
        "text recited from its beginning without a break; none: the loss alone decides",
    )
    max_steps: int | None = stop_option(None, "give up after this many updates; none: never", "steps")
    max_minutes: float | None = stop_option(None, "give up after this long in training; none: never", "minutes")
    max_bad_steps: int = stop_option(
        10, "fail after this many non-finite losses or gradients in a row", "steps", shapes_curve=False
    )
    preflight: Literal["warn", "strict"] = stop_option(
        "warn",
        "warn: print a line if the target is below the entropy floor or memory is short; strict: do not train then",
        shapes_curve=False,
    )
    engine: Literal["auto", "single", "ddp", "sharded", "deepspeed"] = machine_option(
        "auto", "auto: single for one process; of several, sharded on GPUs and ddp on CPUs"
    )
    zero_stage: int | None = machine_option(
        None,
        "what DeepSpeed shards: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights; none: as in ds_config",
    )
    ds_config: str | None = machine_option(None, "DeepSpeed's configuration; none: the project's ds_config.json")
    gradient_compression: Literal["none", "bf16"] = machine_option(
        "none",
        "none: ddp and sharded send gradients unrounded; bf16: in half the bytes, which changes the curve a little",
        may_change=False,
    )
    dtype: Literal["auto", "bf16", "fp32"] = machine_option(
        "auto", "precision of the computation; auto: bf16 where the device is faster in it, else fp32", may_change=False
    )
    head_dtype: Literal["auto", "fp8"] = machine_option(
        "auto",
        "precision of the output layer's products in training; auto: as --dtype; fp8: for GPUs from Ada on, where "
        "it has not been measured yet; it changes the curve a little",
        may_change=False,
    )
    health: Literal["off", "warn", "strict"] = machine_option(
        "off",
        "measure every rank first, for 10 s at most; warn: name slow and wrong ranks; strict: do not train with them",
        shapes_curve=False,
    )
    replica_check_every: int | None = machine_option(
        100,
        "how often the ranks of ddp and ZeRO 0 compare what each holds whole, bit for bit; none: only before saves and "
        "verdicts, as with other engines",
        "steps",
        shapes_curve=False,
    )
    gradient_check_every: int | None = machine_option(
        200,
        "how often each of several ranks computes another's gradient again, and they compare; none: never",
        "steps",
        shapes_curve=False,
    )
    compile: Literal["auto", "true", "false"] = machine_option(
        "auto", "torch.compile the model; auto: on CUDA, in a long run"
    )
    inject: str | None = machine_option(
        None,
        "break a new run on purpose, KIND:rank=R,step=S: kill, freeze, slow, nan, flip, full_disk or drop_gradient; "
        "needs NANOGPT_ALLOW_FAULTS=1",
        shapes_curve=False,
    )
    comm_timeout_s: float = machine_option(
        600.0, "end the run when a rank is missing or makes no progress for this long", "seconds", shapes_curve=False
    )
    out_dir: str = output_option("out", "run directory; a run that it holds is resumed")
    log_every: int = output_option(10, "interval of the rows in metrics.jsonl and on the terminal", "steps")
    profile_steps: str | None = output_option(
        None, "trace these steps into out_dir/profile, as a Python slice of steps counted from 1: 10:13 is 10, 11, 12"
    )
    checkpoint_every: int = output_option(
        1000, "interval of the checkpoints, which are written in the background", "steps"
    )
    checkpoint_minutes: float | None = output_option(
        5.0, "also save a checkpoint this long after the last; none: never", "minutes"
    )
    keep_checkpoints: int = output_option(2, "how many of the newest stay on disk", "checkpoints")
    wandb: Literal["auto", "online", "offline", "disabled"] = wandb_option(
        "auto", "Weights & Biases; auto: online with a key, offline without, WANDB_MODE if that is set"
    )
    wandb_project: str | None = wandb_option(None, "project of the run; none: WANDB_PROJECT, or nanogpt-overfit")
    wandb_group: str | None = wandb_option(None, "runs that belong together; none: WANDB_RUN_GROUP")
    wandb_name: str | None = wandb_option(None, "name of the run; none: WANDB_NAME, or one that W&B chooses")
    wandb_tags: str | None = wandb_option(None, "tags, separated by commas")
    wandb_notes: str | None = wandb_option(None, "notes on the run")
    wandb_artifact: Literal["true", "false"] = wandb_option("false", "upload the final weights too")
    resume: str = output_option(
        "auto",
        "auto: resume from out_dir's newest checkpoint, if any; must: fail without one; never: start a new run; the "
        "path of a checkpoint or a run: start from it. The same command, started again, resumes the run that it "
        "started; to start anew, name another out_dir",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, *(f.name for f, _ in option_types(type(self)) if f.name not in ("seed", "ema", "zero_stage"))
        )
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise ConfigError(f"--zero_stage={self.zero_stage} must be from 0 to 3")
        for name in ("zero_stage", "ds_config"):
            if getattr(self, name) is not None and self.engine != "deepspeed":
                raise ConfigError(f"--{name}={getattr(self, name)} works with --engine=deepspeed only")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed={self.seed} must be from 0 to 2**63 - 1")
        if self.profile_steps is not None and not self.profiled_steps:
            raise ConfigError(
                f"--profile_steps={self.profile_steps} must be START:STOP with 1 <= START < STOP; the last step is the "
                f"one before STOP"
            )
        if self.target_recall is not None and self.target_recall > 1:
            raise ConfigError(f"--target_recall={self.target_recall} must be a share, 1 at most")
        _ = self.fault  # which is refused where it is none
        if not 0 <= self.ema < 1:
            raise ConfigError(f"--ema={self.ema} must be from 0 to less than 1")
        for name, most in (("batch_size", MOST_WINDOWS), ("comm_timeout_s", LARGEST)):
            if getattr(self, name) > most:
                raise ConfigError(f"--{name}={getattr(self, name)} must be at most {most}")
        if self.context_length < 2:
            raise ConfigError("--context_length=1 leaves nothing to recall: at least 2")
        if self.n_embd % self.n_head:
            raise ConfigError(f"--n_embd={self.n_embd} must be a multiple of --n_head={self.n_head}")
        if self.context_length > self.block_size:
            raise ConfigError(f"--context_length={self.context_length} must not exceed --block_size={self.block_size}")
        if self.stride is not None and self.stride > self.context_length:
            raise ConfigError(
                f"--stride={self.stride} would leave tokens between windows untrained: at most --context_length="
                f"{self.context_length}"
            )
        if self.subset_tokens is not None and self.subset_tokens <= self.context_length:
            raise ConfigError(
                f"--subset_tokens={self.subset_tokens} is shorter than one window: --context_length="
                f"{self.context_length} needs at least {self.context_length + 1}"
            )

    @property
    def fault(self) -> Fault | None:
        """What inject names."""
        return None if self.inject is None else Fault.parse(self.inject)

    @property
    def profiled_steps(self) -> range:
        """What profile_steps names; no step where it names none."""
        found = re.fullmatch(r"([1-9][0-9]*):([0-9]+)", self.profile_steps or "")
        return range(int(found[1]), int(found[2])) if found else range(0)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainConfig):
    """A TrainConfig in which nothing is left open that a run decides before it begins: its types say what.

    head_dtype 'auto' is as dtype; wandb and resume stay as they were asked; ds_config and zero_stage are none where
    DeepSpeed is not the engine, and a budget that is none is not set.
    """

    subset_tokens: int = field()
    stride: int = field()
    micro_batch_size: int = field()
    optimizer: Literal["adamw", "muon"] = field()
    learning_rate: float = field()
    engine: Literal["single", "ddp", "sharded", "deepspeed"] = field()
    dtype: Literal["bf16", "fp32"] = field()
    compile: Literal["true", "false"] = field()
