"""Comparison of gradients with differences of the loss, and of products with differences of gradients, in float64."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch

__all__ = [
    "LOSS_ROUNDING",
    "NUM_DIRECTIONS",
    "SLOPE_STEP",
    "TOO_NOISY",
    "Evaluate",
    "FiniteDifferences",
    "Linearized",
    "LossGradient",
    "flat",
]

Evaluate = Callable[[Batch, Sequence[Tensor]], Tensor]
"""Loss of one batch at given parameters, in float64, with the same random numbers in every call."""


class Linearized(Protocol):
    """A matrix of one batch in float64, and a function of the parameters that has it as its derivative.

    Attributes:
        gradient: The gradient of the loss, by parameter. The function has this value at the model's parameters.
    """

    gradient: Sequence[Tensor]

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the product of the matrix with tangents."""
        ...

    def gradient_at(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the function at other parameters, which require a gradient."""
        ...


class LossGradient:
    """The Hessian of the loss of one batch in float64, and the gradient as the function that it is the derivative of.

    Args:
        evaluate: Loss of the batch.
        batch: The batch.
        exact: The parameters, float64.
    """

    def __init__(self, evaluate: Evaluate, batch: Batch, exact: Sequence[Tensor]) -> None:
        self._evaluate, self._batch, self._exact = evaluate, batch, exact
        self.gradient = _gradient_of(evaluate, batch, exact, create_graph=True)

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the product of the Hessian with tangents."""
        curved = [(g, t) for g, t in zip(self.gradient, tangents, strict=True) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in self._exact]
        outputs, directions = zip(*curved, strict=True)
        return torch.autograd.grad(
            outputs, self._exact, directions, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    def gradient_at(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the gradient at other parameters, which require a gradient."""
        return _gradient_of(self._evaluate, self._batch, params)


NUM_DIRECTIONS = 3
"""Number of random directions along which the loss is differentiated."""

SLOPE_STEP = 1e-6
"""Step of a difference of losses in units of the size of the weights.

In float64 it is far above rounding, and small enough that almost no unit crosses a kink.
"""

# The same for a difference of gradients, which jump at the kinks of a ReLU.
_SMALL_STEP = 1e-9

LOSS_ROUNDING = 4e-16
"""Rounding of a loss of size 1 in float64."""

# The same for a gradient.
_GRADIENT_ROUNDING = 1e-14

TOO_NOISY = 1e-2
"""Relative noise above which a comparison tells nothing."""


class FiniteDifferences:
    """Sums of gradients, products and finite differences over batches, and their errors.

    The first look takes slopes along all directions and the product with the first one. Errors that rounding does not
    explain need a second look, for two reasons. Differences at twice the step size measure the noise, such as that of a
    part which computes in float32 although its inputs are float64. And now and then a unit crosses a kink along one
    direction, while a wrong product shows along the second one too.

    Args:
        exact: The parameters, float64.
        directions: Directions with entries of size 1, in the shapes of the parameters.
    """

    def __init__(self, exact: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]) -> None:
        self._exact, self._directions = exact, directions
        count = sum(p.numel() for p in exact)
        size = math.sqrt(sum(float(p.detach().square().sum()) for p in exact) / count)
        self._step, self._small_step = SLOPE_STEP * max(size, 1e-3), _SMALL_STEP * max(size, 1e-3)
        self._norm = self._loss = 0.0
        self._slopes = torch.zeros(len(directions), dtype=torch.float64)
        # by number of steps, and by direction; vectors of the size of the parameters only where they are needed
        self._quotients: dict[int, Tensor] = {}
        self._products: dict[int, Tensor] = {}
        self._changes: dict[tuple[int, int], Tensor] = {}

    def add(self, evaluate: Evaluate, batch: Batch, found: Linearized, weight: float) -> None:
        """Add a batch to the first look, with its matrix and gradient."""
        for place, direction in enumerate(self._directions):
            slope = sum(float((g.detach() * d).sum()) for g, d in zip(found.gradient, direction, strict=True))
            self._slopes[place] += weight * slope
        self._norm += weight * float(flat(found.gradient).norm())
        self._loss += weight * self._add_quotients(evaluate, batch, weight, 1)
        self._add_product(found, weight, 0)
        self._add_change(found, weight, 1, 0)

    def add_second_look(
        self, evaluate: Evaluate, batch: Batch, linearize: Callable[[], Linearized] | None, weight: float
    ) -> None:
        """Add a batch to the second look.

        Args:
            evaluate: Loss of the batch.
            batch: The batch.
            linearize: Returns its matrix; None without `has_product_error` after the first look, to take slopes alone.
            weight: Its weight.
        """
        self._add_quotients(evaluate, batch, weight, 2)
        if linearize is not None:
            found = linearize()
            self._add_product(found, weight, 1)
            for num_steps, place in ((2, 0), (1, 1), (2, 1)):
                self._add_change(found, weight, num_steps, place)

    @property
    def has_slope_error(self) -> bool:
        """True if a slope differs from its quotient by more than rounding."""
        return bool((self._slope_errors > 0).any())

    @property
    def has_product_error(self) -> bool:
        """True if the product with the first direction differs from its quotient by more than rounding."""
        return self._product_error(0) > 0

    @property
    def derivative_error(self) -> float:
        """Relative error of the gradient, the largest along all directions; nan if noise hides it."""
        first = self._quotients[1]
        noise = 2 * float((first - self._quotients.get(2, first)).abs().max())
        sizes = first.abs().clamp_min(max(self._norm, 1e-300))
        if noise > TOO_NOISY * float(sizes.min()):
            return math.nan
        return float(((self._slope_errors - noise) / sizes).max().clamp_min(0))

    def product_error(self) -> tuple[float, Tensor, Tensor]:
        """Return the relative error of the product, the direction, and the difference.

        The direction is the one with the smallest error. If noise hides the error, it is nan, and the difference zero.
        """
        error, noise, place = min(self._relative(place) for place in self._products)
        direction, difference = flat(self._directions[place]), self._difference(place)
        length = float(difference.norm())
        if noise > TOO_NOISY or length == 0:
            return (math.nan if noise > TOO_NOISY else 0.0), direction, torch.zeros_like(difference)
        return error, direction, difference * (error * self._length(place) / length)

    def _add_quotients(self, evaluate: Evaluate, batch: Batch, weight: float, num_steps: int) -> float:
        """Add the quotients of the loss along all directions, and return the mean size of the loss."""
        step, total = num_steps * self._step, 0.0
        quotients = self._quotients.setdefault(num_steps, torch.zeros_like(self._slopes))
        for place, direction in enumerate(self._directions):
            ends = [float(evaluate(batch, self._moved(direction, sign * step)).detach()) for sign in (1, -1)]
            quotients[place] += weight * (ends[0] - ends[1]) / (2 * step)
            total += abs(ends[0])
        return total / len(self._directions)

    def _add_product(self, found: Linearized, weight: float, place: int) -> None:
        product = flat(found.product(self._directions[place]))
        self._products.setdefault(place, torch.zeros_like(product)).add_(product, alpha=weight)

    def _add_change(self, found: Linearized, weight: float, num_steps: int, place: int) -> None:
        step = num_steps * self._small_step
        for sign in (1, -1):
            moved = [p.requires_grad_() for p in self._moved(self._directions[place], sign * step)]
            end = flat(found.gradient_at(moved))
            change = self._changes.setdefault((num_steps, place), torch.zeros_like(end))
            change.add_(end, alpha=sign * weight / (2 * step))

    @property
    def _slope_errors(self) -> Tensor:
        """Differences between slopes and quotients beyond rounding, which may be negative."""
        rounding = LOSS_ROUNDING * (1 + self._loss) / self._step
        return (self._slopes - self._quotients[1]).abs() - rounding

    def _difference(self, place: int) -> Tensor:
        return self._products[place] - self._changes[1, place]

    def _length(self, place: int) -> float:
        return max(float(self._products[place].norm()), float(self._changes[1, place].norm()), 1e-300)

    def _product_error(self, place: int) -> float:
        """Return the length of the difference between product and change beyond rounding, which may be negative."""
        rounding = _GRADIENT_ROUNDING * (1 + self._norm) / self._small_step
        return float(self._difference(place).norm()) - rounding

    def _relative(self, place: int) -> tuple[float, float, int]:
        """Return the error beyond rounding and noise, and the noise, both over the length, and the place."""
        first = self._changes[1, place]
        noise = float((first - self._changes.get((2, place), first)).norm())
        length = self._length(place)
        return max(self._product_error(place) - noise, 0.0) / length, noise / length, place

    def _moved(self, direction: Sequence[Tensor], step: float) -> list[Tensor]:
        return [p.detach() + step * d for p, d in zip(self._exact, direction, strict=True)]


def _gradient_of(
    evaluate: Evaluate, batch: Batch, params: Sequence[Tensor], *, create_graph: bool = False
) -> Sequence[Tensor]:
    """Return the gradient of a batch's loss, zero if the loss does not depend on the parameters."""
    loss = evaluate(batch, params)
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in params]
    return torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector without a graph."""
    return torch.cat([part.detach().reshape(-1) for part in parts])
