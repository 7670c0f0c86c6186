"""One run in several processes, as torchrun or `accelerate launch` starts them: who does what, and meeting again.

Apart from common.py because only what scores or asks over many rows is shared out; trainers leave that to accelerate.
"""

from __future__ import annotations

import os
from typing import Any

from files import InputError


def rank_and_world() -> tuple[int, int]:
    """(number of this process from 0, number of processes); (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_share(count: int) -> range:
    """Which of `count` rows are this process's: one stretch each, so that results are joined by putting them in a
    line."""
    rank, world = rank_and_world()
    return range(count * rank // world, count * (rank + 1) // world)


def gather(value: Any) -> list[Any]:
    """The value of every process, by rank, in every process; waits for the slowest."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    from datetime import timedelta

    from torch import distributed

    if not distributed.is_initialized():  # gloo: what is exchanged lies in main memory, on GPU machines too
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
    values = [None] * world
    distributed.all_gather_object(values, value)
    return values


def only_one(what: str) -> None:
    """Raises InputError where a launcher started several processes of what runs in one."""
    if rank_and_world()[1] > 1:
        raise InputError(f"{what} runs in one process; start the script without a launcher")
