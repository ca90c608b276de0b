"""AdamW is torch's, and an engine's step is one of it."""

import sys

import pytest
import torch

from harness.runs import ALONE, REPOSITORY, run
from nanogpt.engine import Batch, EngineOptions, build_engine
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.optim.optimizer import gradient_norm

WITHOUT_COMPILER = """
import sys, torch
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.optim.optimizer import BETAS, build_optimizer, set_learning_rate
from nanogpt.distributed.world import World

def trained(build):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=16))
    optimizer = build(model)
    set_learning_rate(optimizer, 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(8)[None], torch.arange(1, 9)[None]).backward()
        optimizer.step()
    return [*model.parameters()]

for name in ("muon", "adamw"):
    ours = trained(lambda model: build_optimizer(model, World.from_env(), name=name, dtype="fp32"))
assert "torch._dynamo" not in sys.modules
torchs = trained(lambda model: torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0.0, fused=True))
assert "torch._dynamo" in sys.modules, "else nothing is to be gained"
assert all(map(torch.equal, ours, torchs))
"""


def test_adamw_without_torchs_compiler():
    """Reference: torch.optim.AdamW, bit for bit; ours leaves torch's compiler, a second of a start, where it is."""
    done = run(sys.executable, "-c", WITHOUT_COMPILER, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_the_gradient_norm_is_exact():
    """Reference: double precision, 1e-7; one fp32 sum over as many values is off by 1e-4."""
    model = torch.nn.Embedding(50257, 128)
    model.weight.grad = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert gradient_norm(model).item() == pytest.approx(model.weight.grad.double().norm().item(), rel=1e-7)


@pytest.mark.parametrize("pieces", [1, 3])
def test_an_engines_step_is_plain_adamw(pieces):
    """Reference: torch's unfused AdamW on the mean loss of the whole batch, five steps, weights to 1e-6."""
    config = GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=16)
    torch.manual_seed(0)
    ours, plain = GPT(config), GPT(config)
    plain.load_state_dict(ours.state_dict())
    engine = build_engine(
        "single", ours, ALONE, EngineOptions(dtype="fp32", optimizer="adamw", compile=False, micro_batches=[])
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    for step in range(5):
        ids = torch.randint(50257, (6, 9), generator=torch.Generator().manual_seed(step))
        idx, targets = ids[:, :-1], ids[:, 1:]
        parts = [Batch(i, t, targets.numel()) for i, t in zip(idx.chunk(pieces), targets.chunk(pieces), strict=True)]
        for part in parts:
            engine.forward_backward(part, is_last=part is parts[-1])
        result = engine.step(1e-3)
        loss = torch.nn.functional.cross_entropy(plain(idx).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), float("inf"))
        optimizer.step()
        assert result.loss_sum / targets.numel() == pytest.approx(loss.item(), rel=1e-6)
        assert result.grad_norm == pytest.approx(expected_norm.item(), rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if name.endswith(
            "c_attn.bias"
        ):  # softmax ignores a bias of the keys: its gradient is rounding, which Adam scales
            a, b = (torch.cat([x[:16], x[32:]]) for x in (a, b))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
