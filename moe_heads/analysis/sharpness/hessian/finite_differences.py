"""Comparison of gradients with differences of the loss, and of products with differences of gradients, in float64."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch

__all__ = ["NUM_DIRECTIONS", "Evaluate", "FiniteDifferences", "differentiated", "flat", "gradient_of"]

Evaluate = Callable[[Batch, Sequence[Tensor]], Tensor]
"""Loss of one batch at given parameters, in float64, with the same random numbers in every call."""

NUM_DIRECTIONS = 3
"""Number of random directions along which the loss is differentiated."""

# Number of these along which the gradient is differentiated. The smallest difference counts, because now and then a
# unit crosses a kink along one of them, while a wrong product shows along all.
_NUM_PRODUCTS = 2

# Step of a difference of losses in units of the size of the weights. In float64 it is far above rounding, and small
# enough that almost no unit crosses a kink.
_STEP = 1e-6

# The same for a difference of gradients, which jump at the kinks of a ReLU.
_SMALL_STEP = 1e-9

# Rounding of a loss and of a gradient of size 1 in float64.
_LOSS_ROUNDING, _GRADIENT_ROUNDING = 4e-16, 1e-14

# Relative noise above which a comparison tells nothing.
_TOO_NOISY = 1e-2


class FiniteDifferences:
    """Sums of gradients, products and finite differences over batches, and their errors.

    Differences at twice the step size measure the noise, such as that of a part which computes in float32 although its
    inputs are float64. It is no error of the derivatives. The second step size is needed only if there are errors.

    Args:
        exact: The parameters, float64.
        directions: Directions with entries of size 1, in the shapes of the parameters.
    """

    def __init__(self, exact: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]) -> None:
        self._exact, self._directions = exact, directions
        count = sum(p.numel() for p in exact)
        size = math.sqrt(sum(float(p.detach().square().sum()) for p in exact) / count)
        self._step, self._small_step = _STEP * max(size, 1e-3), _SMALL_STEP * max(size, 1e-3)
        self._norm = self._loss = 0.0
        self._slopes = torch.zeros(len(directions), dtype=torch.float64)
        self._quotients = torch.zeros(2, len(directions), dtype=torch.float64)
        self._products = torch.zeros(_NUM_PRODUCTS, count, dtype=torch.float64, device=exact[0].device)
        self._changes = torch.zeros(2, *self._products.shape, dtype=torch.float64, device=exact[0].device)

    def add(self, evaluate: Evaluate, batch: Batch, gradient: Sequence[Tensor], weight: float) -> None:
        """Add a batch with its gradient, which has a graph."""
        for place, direction in enumerate(self._directions):
            slope = sum(float((g.detach() * d).sum()) for g, d in zip(gradient, direction, strict=True))
            self._slopes[place] += weight * slope
        self._norm += weight * float(flat(gradient).norm())
        for product, direction in zip(self._products, self._directions, strict=False):
            product.add_(flat(differentiated(gradient, self._exact, direction)), alpha=weight)
        self._add_differences(evaluate, batch, weight, 0)

    def add_twice_the_step(self, evaluate: Evaluate, batch: Batch, weight: float) -> None:
        """Add the differences of a batch at twice the step size, if `needs_noise`."""
        self._add_differences(evaluate, batch, weight, 1)

    def _add_differences(self, evaluate: Evaluate, batch: Batch, weight: float, which: int) -> None:
        step, small_step = self._step * (1 + which), self._small_step * (1 + which)
        for place, direction in enumerate(self._directions):
            ends = [float(evaluate(batch, self._moved(direction, sign * step)).detach()) for sign in (1, -1)]
            self._quotients[which, place] += weight * (ends[0] - ends[1]) / (2 * step)
            self._loss += weight * abs(ends[0]) / len(self._directions) if which == 0 else 0.0
        for change, direction in zip(self._changes[which], self._directions, strict=False):
            for sign in (1, -1):
                moved = [p.requires_grad_() for p in self._moved(direction, sign * small_step)]
                change.add_(flat(gradient_of(evaluate, batch, moved)), alpha=sign * weight / (2 * small_step))

    @property
    def needs_noise(self) -> bool:
        """True if there is an error that rounding does not explain."""
        return bool((self._slope_errors > 0).any()) or bool((self._product_errors > 0).all())

    def measured(self, *, has_noise: bool) -> "tuple[float, float, Tensor, Tensor]":
        """Return relative errors of gradient and product, direction and error of the product; nan if noise hides them.

        Args:
            has_noise: Whether the differences at twice the step size were added.
        """
        size = torch.maximum(torch.full_like(self._slopes, self._norm), self._quotients[0].abs()).clamp_min(1e-300)
        noise = 2 * (self._quotients[0] - self._quotients[1]).abs().max() if has_noise else torch.zeros(())
        slope_error = float(((self._slope_errors - noise) / size).max().clamp_min(0))
        if float((noise / size).max()) > _TOO_NOISY:
            slope_error = math.nan
        length = torch.maximum(self._products.norm(dim=1), self._changes[0].norm(dim=1)).clamp_min(1e-300)
        noises = (self._changes[0] - self._changes[1]).norm(dim=1) if has_noise else torch.zeros_like(length)
        errors = (self._product_errors - noises).clamp_min(0)
        best = int((errors / length).argmin())
        difference = self._products[best] - self._changes[0, best]
        difference = difference * (errors[best] / difference.norm().clamp_min(1e-300))
        is_noisy = float(noises[best] / length[best]) > _TOO_NOISY
        product_error = math.nan if is_noisy else float(errors[best] / length[best])
        return slope_error, product_error, flat(self._directions[best]), difference

    @property
    def _slope_errors(self) -> Tensor:
        """Differences between slopes and quotients beyond rounding, which may be negative."""
        rounding = _LOSS_ROUNDING * (1 + self._loss) / self._step
        return (self._slopes - self._quotients[0]).abs() - rounding

    @property
    def _product_errors(self) -> Tensor:
        """Lengths of the differences between products and changes beyond rounding, which may be negative."""
        rounding = _GRADIENT_ROUNDING * (1 + self._norm) / self._small_step
        lengths: Tensor = (self._products - self._changes[0]).norm(dim=1)
        return lengths - rounding

    def _moved(self, direction: Sequence[Tensor], step: float) -> list[Tensor]:
        return [p.detach() + step * d for p, d in zip(self._exact, direction, strict=True)]


def gradient_of(
    evaluate: Evaluate, batch: Batch, params: Sequence[Tensor], *, create_graph: bool = False
) -> Sequence[Tensor]:
    """Return the gradient of a batch's loss, zero if the loss does not depend on the parameters."""
    loss = evaluate(batch, params)
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in params]
    return torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def differentiated(
    gradient: Sequence[Tensor], params: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the product of the Hessian with tangents, from a gradient with a graph."""
    curved = [(g, t) for g, t in zip(gradient, tangents, strict=True) if g.requires_grad]
    if not curved:
        return [torch.zeros_like(p) for p in params]
    outputs, directions = zip(*curved, strict=True)
    return torch.autograd.grad(
        outputs, params, directions, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector without a graph."""
    return torch.cat([part.detach().reshape(-1) for part in parts])
