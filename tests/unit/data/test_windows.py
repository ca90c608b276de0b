"""Windows: every token covered, one global order, shares that add up."""

import pytest
import torch

from nanogpt.data.windows import Windows
from nanogpt.distributed.world import World


def make(n=200, length=16, stride=16, phase="random", seed=0):
    return Windows(torch.arange(n), context_length=length, stride=stride, phase=phase, seed=seed)


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("n", [17, 18, 33, 200, 201])
@pytest.mark.parametrize("phase", ["random", "fixed"])
def test_every_grid_covers_every_token(n, stride, phase):
    """Invariant: whatever the offset, each token but the first is a target of some window, and windows lie inside."""
    windows = make(n, 16, stride, phase)
    for offset in windows.offsets:
        idx, targets = windows.take(windows.grid(offset))
        assert set(targets.flatten().tolist()) == set(range(1, n))
        assert torch.equal(idx + 1, targets)  # ids are 0, 1, 2, ...: windows are runs of the text


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("n", [17, 18, 33, 200, 201])
def test_every_epoch_goes_round_the_text(n, stride):
    """Invariant: each token is a target in each epoch, the first one after the last, and windows are runs of the ring.

    Once where the text is a multiple of the windows: no end of it is seen more often.
    """
    windows = make(n, 16, stride)
    for epoch in range(stride):
        starts = windows.epoch_starts(epoch)
        assert len(starts) == windows.per_epoch
        idx, targets = windows.take(starts)
        assert set(targets.flatten().tolist()) == set(range(n))
        assert torch.equal(idx[:, 1:], targets[:, :-1])
        assert torch.equal((idx + 1) % n, targets)
        if n % stride == 0 and stride == 16:
            assert len(targets.flatten()) == n


def test_a_shifted_grid_shows_each_token_at_each_position():
    """Invariant: in a cycle of epochs, once; the text's last tokens too, which a recital has anywhere in a window."""
    windows = make(208)
    seen = torch.zeros(208, 16, dtype=torch.int64)
    for epoch in range(16):
        _, targets = windows.take(windows.epoch_starts(epoch))
        seen.index_put_((targets, torch.arange(16).expand_as(targets)), torch.tensor(1), accumulate=True)
    assert (seen == 1).all()


@pytest.mark.parametrize("phase", ["random", "fixed"])
def test_each_epoch_holds_its_windows_once(phase):
    """Invariant: an epoch's batches are a permutation of its windows."""
    windows = make(phase=phase)
    order = torch.cat([windows.global_batch(step, 1) for step in range(3 * windows.per_epoch)])
    for epoch, starts in enumerate(order.split(windows.per_epoch)):
        assert torch.equal(starts.sort().values, windows.epoch_starts(epoch).sort().values)


def test_every_offset_comes_before_any_comes_again():
    """Invariant: in each cycle of `stride` epochs every offset occurs once, in an order that differs by cycle."""
    windows = make(stride=8)
    cycles = [[windows.offset(8 * cycle + i) for i in range(8)] for cycle in range(3)]
    assert all(sorted(cycle) == list(range(8)) for cycle in cycles)
    assert cycles[0] != cycles[1] != cycles[2]


def test_the_order_is_a_pure_function_of_seed_and_step():
    """Invariant: asked in any order, by any object, a step gives the same batch; another seed gives another."""
    forward = [make().global_batch(step, 6) for step in range(40)]
    windows = make()
    backward = [windows.global_batch(step, 6) for step in reversed(range(40))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert not torch.equal(forward[0], make(seed=1).global_batch(0, 6))


@pytest.mark.parametrize("batch_size", [1, 5, 13, 40])
def test_a_batch_goes_on_where_the_last_one_ended(batch_size):
    """Reference: the windows one by one; a batch may straddle epochs of 13 windows, or hold several."""
    windows = make()
    assert windows.per_epoch == 13
    one_by_one = torch.cat([windows.global_batch(i, 1) for i in range(3 * 40)])
    batches = [windows.global_batch(step, batch_size) for step in range(120 // batch_size)]
    assert torch.equal(torch.cat(batches), one_by_one[: 120 // batch_size * batch_size])


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
def test_the_ranks_shares_make_up_the_global_batch(size):
    """Invariant: the shares, in order of rank, are the batch, and differ by one row at most."""
    shares = [torch.arange(16)[World(r, r, size, torch.device("cpu")).rows(16)] for r in range(size)]
    assert torch.cat(shares).tolist() == list(range(16))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_fixed_grid_stays():
    """Invariant: with phase='fixed' every epoch has the windows of offset 0."""
    windows = make(phase="fixed")
    assert windows.whole_starts().tolist() == [*range(0, 177, 16), 183]
    assert {windows.offset(epoch) for epoch in range(20)} == {0}
    assert windows.judged_starts(4).tolist() == windows.whole_starts().tolist()


def test_a_full_pass_reads_evenly_spaced_grids():
    """Invariant: four offsets of sixteen, 0, 4, 8 and 12; the ends, which all grids share, are judged once."""
    windows = make()
    expected = {start for offset in (0, 4, 8, 12) for start in windows.grid(offset).tolist()}
    assert windows.judged_starts(4).tolist() == sorted(expected)
    assert expected <= set(windows.whole_starts().tolist())


def test_random_starts_are_anywhere():
    """Invariant: different starts, the same each time, every one of them where there are not more."""
    windows = make()
    assert torch.equal(windows.random_starts(20), make().random_starts(20))
    assert len(set(windows.random_starts(20).tolist())) == 20
    assert sorted(windows.random_starts(1000).tolist()) == list(range(windows.last_start + 1))


def test_too_short_a_text():
    """Invariant: one window needs context_length + 1 tokens."""
    assert make(17).take(torch.tensor([0]))[1].tolist() == [list(range(1, 17))]
    with pytest.raises(ValueError, match="do not fill"):
        make(16)
