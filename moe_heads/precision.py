"""The precision of operations that autocast does not know, or must not touch."""

import torch
from torch import Tensor

__all__ = ["compute_dtype", "is_autocasting"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `torch.nn.functional.linear` would compute for these rows."""
    # autocast leaves float64 alone
    return torch.get_autocast_dtype(x.device.type) if is_autocasting(x) and x.dtype != torch.float64 else x.dtype


def is_autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; devices such as "meta" have none."""
    device = x.device.type
    available = device in {"cpu", "cuda"} or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)
