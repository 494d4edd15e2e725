"""The global random number generators of Python, NumPy and torch."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from moe_heads.analysis._shared.interrupts import HeldInterrupts

__all__ = ["generator_states", "generators_kept", "restore_generators", "seed_generators"]


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy, torch and every CUDA device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global random number generators back when the block ends."""
    states = generator_states()
    try:
        yield
    finally:
        with HeldInterrupts():
            restore_generators(states)


def generator_states() -> tuple[Any, ...]:
    """States of the generators of Python, NumPy, torch and every CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def restore_generators(states: tuple[Any, ...]) -> None:
    """Put back what `generator_states` returned."""
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
