"""Precision of operations that autocast does not cover or must not change."""

import torch
from torch import Tensor

__all__ = ["compute_dtype", "is_autocasting"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which `torch.nn.functional.linear` would compute for these rows."""
    # autocast does not cast float64
    return torch.get_autocast_dtype(x.device.type) if is_autocasting(x) and x.dtype != torch.float64 else x.dtype


def is_autocasting(x: Tensor) -> bool:
    """Return whether autocast is enabled for the device of x. Devices such as "meta" have no autocast."""
    device = x.device.type
    available = device in {"cpu", "cuda"} or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)
