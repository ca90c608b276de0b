"""How ranks share out what they do together, without ranks."""

import pytest
import torch

from nanogpt.distributed.world import World


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 43, 64])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_the_parts_of_a_full_pass_are_each_window_once(size, count, rows):
    """Invariant: the ranks' parts in order are the items; no part is too long, and every rank has as many."""
    shares = [World(r, r, size, torch.device("cpu")).parts(torch.arange(count), rows) for r in range(size)]
    assert torch.cat([part for share in shares for part in share]).tolist() == list(range(count))
    assert max(len(part) for share in shares for part in share) <= rows
    assert len({len(share) for share in shares}) == 1
