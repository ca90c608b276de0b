"""The average of the weights."""

import torch

from nanogpt.optim.ema import EMA


def test_the_average_is_the_exponential_one():
    """Reference: the recurrence, in double precision."""
    model = torch.nn.Linear(3, 2)
    average, expected = EMA(list(model.parameters()), 0.9), None
    for step in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        now = [p.detach().double() for p in model.parameters()]
        expected = now if expected is None else [0.9 * e + 0.1 * n for e, n in zip(expected, now, strict=True)]
        average.update()
    last = [p.detach().clone() for p in model.parameters()]
    with average.applied():
        for got, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(got.detach().double(), wanted, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), last, strict=True))


def test_an_average_of_nothing_changes_nothing():
    """Invariant: before the first update the model's own weights are judged."""
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with EMA(list(model.parameters()), 0.9).applied():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
