"""Ranks of one world, forked from this process.

figures = first_of(3, work, argument)       # work(world, argument) in each
"""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanogpt.distributed.world import World
from nanogpt.storage.json_file import write_json
from parts.options import read_result


def first_of(ranks: int, work: Callable[..., Any], *args: Any) -> Any:
    """work(world, *args) in forked processes of one world -> what the first has returned.

    Raises SystemExit where one fails.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory, "found.json")

        def become(rank: int) -> None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            world = World.from_env()
            with world.process_group():
                told = work(world, *args)
            if world.is_first:
                write_json(found, told)

        processes = [multiprocessing.get_context("fork").Process(target=become, args=(r,)) for r in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{work.__name__} has failed")
        return read_result(found)
