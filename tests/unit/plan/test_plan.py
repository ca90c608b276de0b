"""What 'auto' and 'none' become, before anything exists."""

import pytest
import torch

from nanogpt.config.errors import ConfigError
from nanogpt.config.train_config import DEFAULT_SUBSET_TOKENS, TrainConfig
from nanogpt.data.tokenizer import encode
from nanogpt.distributed.world import World
from nanogpt.optim.recipe import resolve_recipe
from nanogpt.plan.plan import _check_fp8, compiling_pays, make_plan


def world(size=1, rank=0):
    return World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))


def test_nothing_is_left_open():
    """Invariant: a resolved configuration leaves no choice of the program's own open; none is for what nobody asked."""
    config = make_plan(TrainConfig(), world()).config
    assert (config.engine, config.compile, config.stride, config.micro_batch_size) == ("single", "false", 64, 16)
    assert config.subset_tokens == DEFAULT_SUBSET_TOKENS
    assert config.dtype in ("bf16", "fp32")
    not_asked = {"target_recall", "max_steps", "max_minutes", "init_from", "profile_steps", "inject"}
    not_asked |= {f"wandb_{name}" for name in ("project", "group", "name", "tags", "notes")}
    assert {name for name, value in vars(config).items() if value is None} == {*not_asked, "zero_stage", "ds_config"}
    config = make_plan(TrainConfig(engine="deepspeed"), world()).config
    assert {name for name, value in vars(config).items() if value is None} == not_asked


@pytest.mark.parametrize(("size", "share"), [(1, 16), (2, 8), (3, 6), (8, 2), (16, 1)])
def test_a_rank_holds_no_more_than_its_share(size, share):
    """Invariant: without a bound a rank takes all its rows at once; a bound above its share changes nothing."""
    assert make_plan(TrainConfig(), world(size)).config.micro_batch_size == share
    assert make_plan(TrainConfig(micro_batch_size=100), world(size)).config.micro_batch_size == share
    assert make_plan(TrainConfig(micro_batch_size=1), world(size)).config.micro_batch_size == 1


@pytest.mark.parametrize(
    ("device", "changes", "pays"),
    [
        ("NVIDIA H200", {}, False),  # 928 steps at most: seconds
        ("NVIDIA H200", {"subset_tokens": 338025, "context_length": 256, "batch_size": 32}, True),
        ("NVIDIA H200", {"subset_tokens": 338025, "context_length": 256, "batch_size": 32, "max_steps": 100}, False),
        ("NVIDIA L4", {"subset_tokens": 16384}, True),  # an eighth of the speed, eight times the text
        ("Some GPU", {}, True),
    ],
)
def test_compiling_must_give_its_time_back(monkeypatch, device, changes, pays):
    """Invariant: auto compiles on a GPU where a run may be long enough; no GPU is needed to decide it."""
    monkeypatch.setattr(World, "device_name", lambda self: device)
    config = resolve_recipe(TrainConfig(**{"subset_tokens": 2048, "dtype": "bf16"} | changes))
    gpu = World(rank=0, local_rank=0, size=1, device=torch.device("cuda", 0))
    assert compiling_pays(config, gpu) is pays
    assert not compiling_pays(config, world())


def test_not_every_engine_compresses_gradients():
    """Invariant: an option that would do nothing is refused."""
    assert make_plan(TrainConfig(gradient_compression="bf16"), world(2)).config.engine == "ddp"
    for engine, size in (("auto", 1), ("deepspeed", 2)):
        with pytest.raises(ConfigError, match="--gradient_compression=bf16 works with --engine=ddp and sharded"):
            make_plan(TrainConfig(gradient_compression="bf16", engine=engine), world(size))


@pytest.mark.parametrize(
    ("device", "capability", "options", "why"),
    [
        ("cuda", (8, 9), {}, None),
        ("cuda", (8, 0), {}, "needs an NVIDIA GPU from Ada or Hopper on, and this is NVIDIA A100"),
        ("mps", None, {}, "needs an NVIDIA GPU from Ada or Hopper on, and this is mps"),
        ("cpu", None, {}, None),  # which computes the same, slowly
        ("cpu", None, {"context_length": 24}, "--context_length=24 must be a multiple of 16"),
        ("cpu", None, {"n_embd": 72, "n_head": 2}, "--n_embd=72 must be a multiple of 16"),
    ],
)
def test_where_fp8_cannot_be_had_it_is_refused(monkeypatch, device, capability, options, why):
    """Reference: what torch._scaled_mm needs; no GPU is needed to say so."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    here = World(rank=0, local_rank=0, size=1, device=torch.device(device))
    config = TrainConfig(head_dtype="fp8", dtype="fp32", **options)
    if why is None:
        _check_fp8(config, here)
    else:
        with pytest.raises(ConfigError, match="--head_dtype=fp8") as caught:
            _check_fp8(config, here)
        assert why in str(caught.value)


def test_every_rank_of_a_world_plans_the_same_run():
    """Invariant: the plan depends on the size of the world, not on the rank."""
    plans = [make_plan(TrainConfig(), world(3, rank)) for rank in range(3)]
    assert all(plan.config == plans[0].config for plan in plans)
    assert all(torch.equal(plan.dataset.judged, plans[0].dataset.judged) for plan in plans)


def test_the_default_subset_bends_to_the_text_and_the_context(tmp_path):
    """Invariant: a short text is taken whole, a long context gets a window; an impossible number is refused."""
    short = tmp_path / "short.txt"
    short.write_text(text := "To be, or not to be: that is the question. " * 20)
    assert make_plan(TrainConfig(data=str(short)), world()).dataset.windows.ids.tolist() == encode(text)
    with pytest.raises(ConfigError, match=f"more than the {len(encode(text))} tokens"):
        make_plan(TrainConfig(data=str(short), subset_tokens=len(encode(text)) + 1), world())
    assert make_plan(TrainConfig(context_length=3000, block_size=4096), world()).config.subset_tokens == 3001


def test_the_floor_is_that_of_the_windows_in_use():
    """Invariant: fixed windows, which have fewer beginnings, have a lower one; strict refuses a target at the floor."""
    plan = make_plan(TrainConfig(), world())
    assert 0 < plan.dataset.floor < 0.099
    with pytest.raises(ConfigError, match="entropy floor"):
        make_plan(TrainConfig(target_loss=plan.dataset.floor, preflight="strict"), world())
    assert make_plan(TrainConfig(phase="fixed"), world()).dataset.floor < plan.dataset.floor
