"""The model against transformers, and against itself with a cache."""

import pytest
import torch
from torch.nn import functional as F

from nanogpt.model.gpt import GPT, GPTConfig, KVCache, TokenCrossEntropy

SMALL = GPTConfig(block_size=48, n_layer=3, n_head=4, n_embd=64)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    with torch.no_grad():  # at initialisation biases are 0 and LayerNorm gains 1, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def transformers_twin(model):
    """transformers' GPT-2 with the same weights; its Conv1D keeps matrices transposed."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    twin = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    twin.load_state_dict({k: v.t() if k.endswith(CONV1D) else v for k, v in model.state_dict().items()})
    return twin.eval()


def test_the_default_has_the_stated_number_of_parameters():
    """Reference: 38,597,376 (wte) + 786,432 (wpe) + 16 x 7,087,872 (blocks) + 1,536 (ln_f)."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_parameters() == 152_791_296
    assert model.lm_head.weight is model.transformer.wte.weight


def test_it_is_printed_as_gpt2():
    """Reference: GPT-2's module names and their order."""
    names = [name for name, _ in GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8)).named_modules() if name]
    assert names == [
        "transformer", "transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h", "transformer.h.0",
        *(f"transformer.h.0.{name}" for name in (
            "ln_1", "attn", "attn.c_attn", "attn.c_proj", "attn.attn_dropout", "attn.resid_dropout",
            "ln_2", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", "mlp.dropout",
        )),
        "transformer.ln_f", "lm_head",
    ]  # fmt: skip


@pytest.mark.parametrize("length", [1, 17, 48])
def test_logits_equal_transformers(small, length):
    """Reference: transformers.GPT2LMHeadModel with the same weights, fp32, to 1e-4."""
    idx = torch.randint(SMALL.vocab_size, (3, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        torch.testing.assert_close(small(idx), transformers_twin(small)(idx).logits, atol=1e-4, rtol=0)


def test_the_full_size_model_equals_transformers():
    """Reference: transformers, at the default 152,791,296 parameters, fp32, to 1e-4."""
    torch.manual_seed(1)
    model = GPT(GPTConfig()).eval()
    idx = torch.randint(50257, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(idx), transformers_twin(model)(idx).logits, atol=1e-4, rtol=0)


def test_the_loss_is_the_sum_of_cross_entropies(small):
    """Reference: torch's cross-entropy over the returned logits."""
    idx = torch.randint(SMALL.vocab_size, (2, 9))
    with torch.no_grad():
        expected = F.cross_entropy(small(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(small(idx[:, :-1], idx[:, 1:]), expected)


def test_gradients_equal_transformers(small):
    """Reference: the gradient of transformers' own loss; CPU attention here is written out, theirs is fused."""
    idx = torch.randint(SMALL.vocab_size, (2, 33), generator=torch.Generator().manual_seed(5))
    twin = transformers_twin(small)
    twin(idx, labels=idx).loss.backward()
    small.zero_grad()
    (small(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel()).backward()
    ours, theirs = dict(small.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        gradient = theirs[name].grad.t() if name.endswith(CONV1D) else theirs[name].grad
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [12]])
def test_a_cache_changes_nothing(small, pieces):
    """Invariant: reading 12 tokens in pieces through a cache gives the logits of reading them at once."""
    idx = torch.randint(SMALL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    cache = KVCache(SMALL, 2, 12, device=idx.device, dtype=torch.float32)
    with torch.no_grad():
        parts = [small(part, cache=cache) for part in idx.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), small(idx), atol=1e-5, rtol=1e-5)


def test_the_initial_spread():
    """Reference: the standard deviations that memorising.md gives; LayerNorms start as the identity."""
    torch.manual_seed(0)
    state = GPT(GPTConfig(n_layer=4, n_head=2, n_embd=64)).state_dict()
    for name, std in (
        ("transformer.wte.weight", 0.06),
        ("transformer.wpe.weight", 0.01),
        ("transformer.h.3.attn.c_attn.weight", 1 / 8),
        ("transformer.h.3.mlp.c_fc.weight", 1 / 8),
        ("transformer.h.3.attn.c_proj.weight", 0.02 / 8**0.5),
        ("transformer.h.3.mlp.c_proj.weight", 0.02 / 8**0.5),
    ):
        assert state[name].std().item() == pytest.approx(std, rel=0.03), name  # 4,096 samples: 1.1 % standard error
    assert all(
        (v == (0 if k.endswith("bias") else 1)).all() for k, v in state.items() if "ln_" in k or k[-4:] == "bias"
    )


def test_impossible_shapes_are_refused(small):
    """Invariant: past block_size, or heads that do not divide the width, nothing is computed."""
    with pytest.raises(ValueError, match="block_size"):
        small(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of n_head"):
        GPT(GPTConfig(n_embd=10, n_head=3))
    with pytest.raises(ValueError, match="block_size"):
        KVCache(SMALL, 1, 49, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_losses_and_their_gradient_are_the_cross_entropys(monkeypatch, dtype, tolerance):
    """Reference: torch's, in double precision; 4e-3 is a rounding of bf16. In chunks of 3 rows, the last of one."""
    monkeypatch.setattr("nanogpt.model.gpt.CHUNK", 3 * 101)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(10, 101, generator=generator)).to(dtype)
    targets = torch.randint(101, (10,), generator=generator)
    weights = torch.rand(10, generator=generator)  # each token's in what is differentiated
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected @ weights.double()).backward()
    given = logits.clone().requires_grad_()
    found = TokenCrossEntropy.apply(given * 1, targets)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    assert found.dtype == torch.float32
    (found @ weights).backward()
    torch.testing.assert_close(given.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        assert torch.equal(TokenCrossEntropy.apply(logits, targets), found)
    assert torch.equal(logits.double(), exact.detach()), "no gradient, nothing is written over"


def test_the_losss_gradient_is_there_once(small):
    """Invariant: a second backward is refused: the gradient was written over the logits, and scaled there."""
    loss = small(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()
    small.zero_grad()
