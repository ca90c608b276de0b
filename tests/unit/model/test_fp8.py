"""The output layer in FP8 against the same values, rounded to FP8, in double precision."""

import pytest
import torch

from nanogpt.model.fp8 import fp8_linear
from nanogpt.model.gpt import GPT, GPTConfig

X, WEIGHT, GRADIENT = (
    scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    for scale, rows, columns in ((3.0, 32, 48), (0.06, 64, 48), (1e-5, 33, 64))
)


def rounded(values, dtype):
    """Values as dtype represents them when the largest of them is dtype's largest number, in double precision."""
    scale = values.abs().max() / torch.finfo(dtype).max
    return (values / scale).to(dtype).double() * scale.double()


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-6), (True, 2**-8)])
def test_the_products_are_those_of_rounded_values(autocast, tolerance):
    """Reference: products in double precision; off by fp32's sums, in bf16 by the rounding of the result."""
    x, weight, gradient = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_(), GRADIENT[:32]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = fp8_linear(x.view(4, 8, 48), weight)
    assert (found.shape, found.dtype) == ((4, 8, 64), torch.bfloat16 if autocast else torch.float32)
    of_x, of_weight = rounded(X, torch.float8_e4m3fn), rounded(WEIGHT, torch.float8_e4m3fn)
    close(found.view(32, 64), of_x @ of_weight.T, tolerance)
    found.backward(gradient.view(4, 8, 64).to(found.dtype))
    of_gradient = rounded(gradient.to(found.dtype).float(), torch.float8_e5m2)
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    close(x.grad, of_gradient @ of_weight, 1e-6)
    close(weight.grad, of_gradient.T @ of_x, 1e-6)
    assert (of_x - X).abs().max() > 1e-3, "else nothing was rounded"


def close(found, expected, tolerance):
    """Within a part of each value, or of the largest where terms cancel."""
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_lost_number_shows(broken):
    """Invariant: a value that is not finite makes the results not finite, so that the step is refused."""
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    gradient = GRADIENT[:32].clone()
    gradient[3, 5] = broken
    fp8_linear(x, weight).backward(gradient)
    assert not x.grad.isfinite().all()
    assert not weight.grad.isfinite().all()
    x.data[0, 0] = broken
    assert not fp8_linear(x, weight).isfinite().all()


def test_zeros_stay_zeros():
    """Invariant: nothing is divided by the largest value of nothing but zeros."""
    assert torch.equal(fp8_linear(torch.zeros(16, 48), WEIGHT), torch.zeros(16, 64))


def test_only_training_is_rounded():
    """Invariant: a full pass is the model's own; the output layer, whose vocabulary is no multiple of 16, is cut."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=211, block_size=16, n_layer=1, n_head=2, n_embd=32))
    idx = torch.arange(32).view(2, 16)
    exact = model(idx)
    model.lm_head.training_product = fp8_linear
    in_training = model(idx)
    assert in_training.shape == exact.shape == (2, 16, 211)
    assert 1e-4 < (in_training - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.equal(model.eval()(idx), exact)
    model.train()(idx, idx).backward()
    assert model.lm_head.weight.grad[210].abs().max() > 0
