"""Seeds and states of random number generators: the global ones, and those of torch on one device."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_heads.analysis._shared.interrupts import HeldInterrupts

__all__ = [
    "generator_states",
    "generators_kept",
    "random_states",
    "restore_generators",
    "seed_generators",
    "set_random_states",
]


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy, torch and every CUDA device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global random number generators when the block ends."""
    states = generator_states()
    try:
        yield
    finally:
        with HeldInterrupts():
            restore_generators(states)


def generator_states() -> tuple[Any, ...]:
    """Return the states of the generators of Python, NumPy, torch and every CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def restore_generators(states: tuple[Any, ...]) -> None:
    """Restore the states that `generator_states` returned."""
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def random_states(device: torch.device) -> list[Tensor]:
    """Return the states of torch's generators of the CPU and, for a GPU, of ``device``."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Restore the states that `random_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
