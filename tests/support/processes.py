"""Run a function in several processes that form a gloo group.

The processes stay for the next call: a new one takes seconds to import torch and Lightning.
"""

import random
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NUM_RANKS = 2

_running: list[tuple[Any, Connection]] = []


def run_on_ranks(function: Callable[[int], Any], folder: Path, *, leaves_traces: bool = False) -> list[Any]:
    """What ``function(rank)`` returns on each rank.

    Args:
        function: The function, of a module that the processes can import.
        folder: Folder for what it returns.
        leaves_traces: Whether it changes modules or classes, or needs processes that ran nothing else.

    Raises:
        RuntimeError: If it raises an error on a rank, or a process ends.
    """
    if leaves_traces:
        _end()
    if not _running:
        _running.extend(_started(rank) for rank in range(NUM_RANKS))
    try:
        for _, connection in _running:
            connection.send((function, str(folder)))
        errors = [connection.recv() for _, connection in _running]
    except EOFError:
        _end()
        raise RuntimeError("a process has ended") from None
    except BaseException:  # such as a timeout
        _end()
        raise
    for rank, error in enumerate(errors):
        if error:
            _end()
            raise RuntimeError(f"rank {rank}: {error}")
    if leaves_traces:
        _end()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


def _started(rank: int) -> tuple[Any, Connection]:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _end() -> None:
    # killed, since a gloo thread may abort a process that shuts down (pytorch/pytorch#190489)
    for process, connection in _running:
        process.kill()
        connection.close()
    _running.clear()


def _serve(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, folder = connection.recv()
        except EOFError:
            return
        try:
            _run(rank, function, folder)
        except BaseException:  # the parent raises it
            connection.send(traceback.format_exc())
            return
        connection.send("")


def _run(rank: int, function: Callable[[int], Any], folder: str) -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    torch.save(function(rank), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
