"""Muon is torch's, but for its iterations, whose effect on singular values is known."""

import pytest
import torch

from harness.runs import ALONE
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.optim.muon import COEFFICIENTS, HEADROOM, channels_together, is_matrix, orthogonalise
from nanogpt.optim.optimizer import build_optimizer, set_learning_rate


@pytest.mark.parametrize("channels", [16, 8])
def test_muon_is_torchs(monkeypatch, channels):
    """Reference: torch.optim.Muon on the blocks' matrices, torch.optim.AdamW on the rest, five steps in fp32.

    Torch's iterations are replaced by ours, which have tests of their own below, on 16 or 8 channels after the other;
    what is compared is all else. 1e-5 is a hundredth of an update: products of a stack round otherwise than those of
    one matrix.
    """
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda x, *_: one_by_one(x, channels))
    monkeypatch.setattr("nanogpt.optim.muon.CHANNELS", channels)
    config = GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=16)
    torch.manual_seed(0)
    ours, theirs = GPT(config), GPT(config)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, ALONE, name="muon", dtype="fp32")
    matrices = [p for name, p in theirs.named_parameters() if is_matrix(name, p)]
    assert len(matrices) == 8
    positions = theirs.transformer.wpe.weight
    rest = [p for name, p in theirs.named_parameters() if not is_matrix(name, p) and p is not positions]
    references = [
        torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([positions], lr=16e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        torch.optim.AdamW(rest, lr=0.6e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    before = [p.detach().clone() for p in matrices]
    for step in range(5):
        ids = torch.randint(50257, (4, 9), generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            model.zero_grad()
            (model(ids[:, :-1], ids[:, 1:]) / 32).backward()
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        for reference in references:
            reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.endswith("c_attn.bias"):  # not the keys': softmax takes no notice of it, its gradient is rounding
            a, b = (bias.view(3, -1)[[0, 2]] for bias in (a, b))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=name)
    moved = max((a - b).abs().max().item() for a, b in zip(before, matrices, strict=True))
    assert moved > 5e-4, "the tolerance tells an update from none"


def one_by_one(x, channels):
    """A matrix orthogonalised, each group of channels by itself."""
    dim = 0 if x.size(0) <= x.size(1) else 1
    return torch.cat([orthogonalise([group[None]], channels)[0][0] for group in x.split(channels, dim)], dim)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.004)]
)
def test_groups_of_channels_are_orthogonalised_by_themselves(dtype, tolerance):
    """Reference: one matrix and group after the other; of several shapes, and of a stack of one, as a rank's share is.

    The tolerances are one or a few roundings of values that are below one: a stack's products may round otherwise.
    """
    random = torch.Generator().manual_seed(0)
    stacks = [torch.randn(shape, generator=random).to(dtype) for shape in ((1, 48, 16), (2, 16, 64), (3, 16, 16))]
    for stack, found in zip(stacks, orthogonalise(stacks, 8), strict=True):
        assert found.is_contiguous()
        expected = torch.stack([one_by_one(x, 8) for x in stack])
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("shape", [(24, 32), (16, 40), (40, 16)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-3)])
def test_orthogonalising_is_a_polynomial_of_the_singular_values(shape, dtype, tolerance):
    """Reference: the iterations on the singular values alone, in double precision; those from 0.0102 on come near one.

    1e-3: a rounding of R, 2**-24, is raised some 1000-fold where the polynomial is steep. The scale does not matter.
    """
    x, u, values, v = with_values(shape, torch.logspace(-3, 0, min(shape), dtype=torch.double))
    expected = values / (HEADROOM * values.pow(4).sum().sqrt()).sqrt()
    for a, b, c in COEFFICIENTS:
        expected = a * expected + b * expected**3 + c * expected**5
    bounded = values / (HEADROOM * values.pow(4).sum().sqrt()).sqrt()
    assert expected[bounded > 0.0102].min() > 0.69
    assert expected.max() < 1.3
    for scale in (1.0, 1e-5, 1e5):
        found = u.mT @ orthogonalise([(scale * x).to(dtype)], min(shape))[0].double() @ v.mT
        torch.testing.assert_close(found, torch.diag_embed(expected.expand(2, -1)), atol=tolerance, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 30.0])
def test_orthogonalising_is_stable_in_bf16(decay):
    """Reference: the same in double precision, for values from all alike to all but one lost to rounding.

    The angle between the two is 12 degrees at most, and no value leaves the others behind.
    """
    x, *_ = with_values((256, 384), torch.arange(1, 257, dtype=torch.double) ** -decay)
    exact, found = orthogonalise([x], 256)[0], orthogonalise([x.bfloat16()], 256)[0].double()
    assert (exact * found).sum() / exact.norm() / found.norm() > 0.978
    assert torch.linalg.svdvals(found).max() < 1.5


@pytest.mark.parametrize(
    ("width", "channels"),
    [(768, 256), (1024, 256), (256, 256), (192, 192), (1600, 320), (16, 16), (131, 131), (521, 521), (2 * 10**9, 256)],
)
def test_the_divisor_next_to_256_is_taken_together(width, channels):
    """Reference: by hand; 1,600 has 200 and 320 beside 256, a prime only itself and one."""
    assert channels_together(width) == channels


def test_orthogonalising_nothing_gives_nothing():
    """Invariant: a matrix without a gradient is not moved; a rank's share of a stack may be none of it."""
    assert orthogonalise([torch.zeros(2, 16, 32, dtype=torch.bfloat16)], 8)[0].count_nonzero() == 0
    for shape in ((0, 32, 16), (0, 16, 32)):
        none, one = orthogonalise([torch.zeros(shape), torch.eye(16)[None]], 8)
        assert none.shape == shape
        assert one.shape == (1, 16, 16)


def with_values(shape, values):
    """Two random matrices with these singular values, (2, *shape), and their decomposition U, values, V^T."""
    random = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    u, _, v = torch.linalg.svd(random, full_matrices=False)
    return (u * values) @ v, u, values, v
