"""How ranks share out what they do together."""

import os

import pytest
import torch

from harness.runs import ALONE, free_port
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


SIZES = (1, 2, 3, 7, 100)


def _filled(world, size, dtype):
    """(which stretches a rank has asked for, what it then holds) of so many values."""
    asked = []

    def read(start, stop):
        asked.append((start, stop))
        return torch.arange(start, stop) / 7

    values = torch.zeros(size, dtype=dtype)
    world.fill(values, read)
    return asked, values


def _fill(rank, port, answers):
    """One rank of three."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = World(rank=rank, local_rank=rank, size=3, device=torch.device("cpu"))
    with world.process_group():
        found = {
            (size, dtype): _filled(world, size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)
        }
        answers.put((rank, {key: (asked, values.float().tolist()) for key, (asked, values) in found.items()}))


def test_three_ranks_fill_a_tensor_together():
    """Reference: what one rank reads alone, bit for bit. Each reads a third, and of what is left all of it."""
    context = torch.multiprocessing.get_context("fork")  # they need not import torch again
    port, answers = free_port(), context.Queue()
    ranks = [context.Process(target=_fill, args=(rank, port, answers)) for rank in range(3)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    for rank, told in found.items():
        for (size, dtype), (asked, values) in told.items():
            alone, expected = _filled(ALONE, size, dtype)
            assert alone == [(0, size)]
            assert values == expected.float().tolist()
            third = size // 3
            parts = [(third * rank, third * (rank + 1)), (3 * third, size)]
            assert asked == [(start, stop) for start, stop in parts if start < stop]
