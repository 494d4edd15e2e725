"""Run a function in several processes that form a gloo group."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NUM_RANKS = 2


def run_on_ranks(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``function(rank)`` returns on each rank."""
    mp.spawn(_one_rank, args=(function, str(folder)), nprocs=NUM_RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


def _one_rank(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    torch.save(function(rank), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # a gloo thread that releases a tensor while the interpreter shuts down aborts the process (pytorch/pytorch#190489)
    time.sleep(0.1)
