"""One run in several processes, as torchrun or `accelerate launch` starts them: shares of rows, and gathering.

Only scoring and teachers' answers to many rows are shared here; trainers leave it to accelerate.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

from common import InputError


def rank_and_world() -> tuple[int, int]:
    """Return (number of this process from 0, number of processes); (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print_note(text: str | None) -> None:
    """Print a note for people, if there is one, on stderr; of several processes the first prints it."""
    if text and rank_and_world()[0] == 0:
        print(f"note: {text}", file=sys.stderr)


def own_share(count: int) -> range:
    """Return which of `count` rows are this process's: one stretch each, so results are joined by concatenation."""
    rank, world = rank_and_world()
    return range(count * rank // world, count * (rank + 1) // world)


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank, in every process; waits for the slowest."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    from torch import distributed

    if not distributed.is_initialized():  # gloo: the values are in main memory, on GPU machines too
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
    values = [None] * world
    distributed.all_gather_object(values, value)
    return values


def only_one(what: str) -> None:
    """Raise InputError where a launcher started several processes of a script that runs in one."""
    if rank_and_world()[1] > 1:
        raise InputError(f"{what} runs in one process; start the script without a launcher")
