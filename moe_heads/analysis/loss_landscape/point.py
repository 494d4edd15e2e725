"""What is measured at one point of a landscape."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NUM_SUMS", "Point", "sums_of"]

NUM_SUMS = 8
"""Sums over the samples: weighted of loss and loss with fixed routing; of accuracy and flips; how many were routed;
the weights of those that were routed to chosen experts, and of all; how many there are."""


def sums_of(
    size: int,
    weight: float,
    loss: float,
    fixed: float,
    accuracy: float,
    flips: float,
    *,
    is_routed: bool,
    is_sparse: bool,
) -> Tensor:
    """Return the sums of one batch, of its number of samples, its weight and its means, (NUM_SUMS,), float64."""
    means = [loss, fixed, accuracy, flips if is_routed else 0.0, is_routed, is_sparse, 1.0, 1.0]
    factors = [weight, weight, size, size, size, weight, weight, size]
    return torch.tensor(factors, dtype=torch.float64) * torch.tensor(means, dtype=torch.float64)


@dataclass(frozen=True)
class Point:
    """Means over the samples at one point; nan for what was not measured or does not exist."""

    loss: float
    fixed: float
    accuracy: float
    flips: float
    num_samples: int

    @classmethod
    def of(cls, sums: Tensor) -> "Point":
        """From the sums over all samples."""
        loss, fixed, accuracy, flips, num_routed, sparse_weight, weight, num_samples = sums.tolist()
        return cls(
            loss / weight,
            fixed / weight if sparse_weight else math.nan,
            accuracy / num_samples,
            flips / num_routed if num_routed else math.nan,
            round(num_samples),
        )

    @property
    def values(self) -> tuple[float, float, float, float]:
        """Loss, loss with fixed routing, accuracy and flips."""
        return self.loss, self.fixed, self.accuracy, self.flips
