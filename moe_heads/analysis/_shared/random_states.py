"""States of torch's random number generators."""

import torch
from torch import Tensor

__all__ = ["random_states", "set_random_states"]


def random_states(device: torch.device) -> list[Tensor]:
    """States of torch's generators, of the CPU and of a GPU if that is the device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
