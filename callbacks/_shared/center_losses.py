"""Comparison of the center losses of all analyses with the same weights and samples."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moe_heads.analysis._shared.half_precision import computes_in_half

__all__ = ["CenterLossError", "center_losses_of", "check_center_losses"]

# Relative tolerances for rounding, and an absolute one for losses near zero.
_IN_HALF, _IN_SINGLE, _IN_DOUBLE, _NEAR_ZERO = 1e-2, 1e-4, 1e-8, 1e-6


class CenterLossError(ValueError):
    """Error raised when two analyses evaluated different functions."""


def center_losses_of(name: str, result: Any) -> dict[str, float]:
    """Return the finite losses of the unperturbed model, by name of the result or of its part.

    Args:
        name: Name of the result, such as "sharpness/train".
        result: Result of an analysis.
    """
    return {where: loss for where, loss in _found(name, result) if math.isfinite(loss)}


def check_center_losses(model: nn.Module, losses: Mapping[str, float]) -> None:
    """Raise an error if losses of the same weights and samples differ beyond rounding.

    Args:
        model: The model.
        losses: Loss by name of the analysis.

    Raises:
        CenterLossError: If two losses differ.
    """
    tolerance = _tolerance(model)
    for first, one in losses.items():
        for second, other in losses.items():
            if abs(one - other) > tolerance * max(abs(one), abs(other)) + _NEAR_ZERO * tolerance / _IN_SINGLE:
                raise CenterLossError(
                    f"loss: expected equal losses for the same weights and samples in all analyses, got {one:.8g} in"
                    f" {first} and {other:.8g} in {second}. Define analysis_loss(batch) as a loss that is the same"
                    " function of the weights with and without gradients, for frozen and trainable parameters, and on"
                    " every call."
                )


def _found(name: str, result: Any) -> Iterator[tuple[str, float]]:
    loss = getattr(result, "center_loss", None)
    if isinstance(loss, float):
        yield name, loss
    named = getattr(result, "parts", None)
    parts = dict(named) if isinstance(named, Mapping) else {}
    parts |= {part: getattr(result, part, None) for part in ("perturbation", "routing")}
    for part, found in parts.items():
        if found is not None:
            yield from _found(f"{name} ({part})", found)


def _tolerance(model: nn.Module) -> float:
    if computes_in_half(model) is not None:
        return _IN_HALF
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return _IN_DOUBLE if dtypes == {torch.float64} else _IN_SINGLE
