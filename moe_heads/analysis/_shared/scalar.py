"""Check that a loss or another user function returned a scalar tensor."""

from typing import TypeGuard

from torch import Tensor

__all__ = ["checked_scalar", "is_scalar"]


def is_scalar(value: object) -> TypeGuard[Tensor]:
    """Return whether ``value`` is a tensor with one element."""
    return isinstance(value, Tensor) and value.numel() == 1


def checked_scalar(value: object, quantity: str, name: str = "loss_fn") -> Tensor:
    """Return ``value`` after checking that it is a tensor with one element.

    Args:
        value: Return value of a user's function.
        quantity: Meaning of the value in the message, such as "the mean loss of batch 3".
        name: Name of the argument in the message.

    Raises:
        ValueError: If it is not such a tensor.

    Example:
        >>> import torch
        >>> from moe_heads.analysis._shared.scalar import checked_scalar
        >>> checked_scalar(torch.tensor(2.0), "the mean loss of batch 0")
        tensor(2.)
    """
    if is_scalar(value):
        return value
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name}: expected a scalar tensor, {quantity}, got {got}.")
