"""Products with a Hessian by central differences of gradients, accepted where two step sizes agree.

They need first derivatives only, at shifted parameters. Away from kinks they equal the exact products up to an error
that the two steps show. At the kinks of a ReLU, gradients jump, and the two steps disagree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GradientAt", "GradientDifferences", "ShiftedGradient", "StepErrors", "StepsDisagreeError"]

# Lengths of the steps, in units of the norm of the parameters, as powers of the resolution of their data type. The
# first balances rounding and curvature along random vectors. Along eigenvectors of a sharp model it is too long.
# Shorter steps than the last lose half of the digits to rounding.
_POWERS = (1 / 3, 5 / 12, 1 / 2)

# Relative noise above which a comparison of the loss with its gradient tells nothing.
_TOO_NOISY = 1e-2


@dataclass(frozen=True, eq=False)
class ShiftedGradient:
    r"""The gradient at :math:`\theta + t v`, as far as this process knows it.

    Attributes:
        gradient: Part of the gradient g in this process, flat.
        forms: Contribution of this part to :math:`v^T g`, by part of the data, (S,).
        loss: Contribution of the samples of this process to the loss.
    """

    gradient: Tensor
    forms: Tensor
    loss: float


GradientAt = Callable[[float], ShiftedGradient]
r"""The gradient at :math:`\theta + t v`, by t."""


@dataclass(frozen=True)
class StepErrors:
    """Errors of a product, over all processes.

    Attributes:
        difference: Norm of the difference between the products with the steps h and h/2.
        form: The same difference times v.
        relative: ``difference`` in units of the matrix times v.
        derivative: Relative difference between the gradient and a difference of the loss along v; nan if noise hides
            it.
    """

    difference: float
    form: float
    relative: float
    derivative: float


class StepsDisagreeError(ValueError):
    """Error raised if a product depends on the step of its finite difference."""


class GradientDifferences:
    r"""Products :math:`Hv` from gradients at :math:`\theta \pm h v` and :math:`\theta \pm h v / 2`.

    The step moves the parameters by a fraction of their norm. The two central differences are extrapolated to step zero
    (Richardson), and their difference bounds the error. If they disagree, two shorter steps are tried.

    Args:
        size: Norm of the parameters, over all processes.
        dtype: Data type of the parameters.
        tolerance: Largest difference between the products with the steps h and h/2, in units of the matrix times v.
        num_parameters: P.
        all_reduce: Returns the sum of a small tensor over the processes that hold parts of the parameters. By default
            this process holds all of them.

    Attributes:
        scale: Largest :math:`\|Hv\| / \|v\|` so far.
        last: Errors of the last product.
        largest: Largest relative and largest absolute difference of all products, the latter for vectors of length 1.
        derivative_error: Largest derivative error of the products so far; nan if noise hides all of them.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.hessian.gradient_differences import GradientDifferences, ShiftedGradient
        >>> theta, v = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 0.0]).double()
        >>> def gradient_at(t):  # of the sum of the cubes
        ...     gradient = 3 * (theta + t * v).square()
        ...     return ShiftedGradient(gradient, (v * gradient).sum()[None], float((theta + t * v).pow(3).sum()))
        >>> differences = GradientDifferences(float(theta.norm()), theta.dtype, 1e-3, 2)
        >>> differences.product(gradient_at, float(v.norm())).gradient.round(decimals=8).tolist()
        [6.0, 0.0]
    """

    def __init__(
        self,
        size: float,
        dtype: torch.dtype,
        tolerance: float,
        num_parameters: int,
        all_reduce: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self._distances = [torch.finfo(dtype).eps ** power * max(size, 1e-3) for power in _POWERS]
        self._tolerance, self._num_parameters, self._all_reduce = tolerance, num_parameters, all_reduce
        self.scale, self.largest = 0.0, (0.0, 0.0)
        self.last: StepErrors | None = None
        self.derivative_error = math.nan

    def product(self, gradient_at: GradientAt, length: float) -> ShiftedGradient:
        """Return the product with a vector v: its part in this process, and its forms by part of the data.

        Args:
            gradient_at: The gradient along v.
            length: Norm of v, over all processes.

        Raises:
            StepsDisagreeError: If the products with the two steps differ by more than the tolerance.
        """
        if length == 0:
            at_center = gradient_at(0.0)
            return ShiftedGradient(
                torch.zeros_like(at_center.gradient), torch.zeros_like(at_center.forms), at_center.loss
            )
        disagreements: dict[float, StepErrors] = {}
        for distance in self._distances:
            step = distance / length
            wide, narrow = (_central(gradient_at, part) for part in (step, step / 2))
            product = _extrapolated(narrow.product, wide.product)
            errors, norm = self._errors(wide, narrow, product, length)
            if errors.relative <= self._tolerance:
                self._record(errors, norm, length)
                return ShiftedGradient(product, _extrapolated(narrow.forms, wide.forms), narrow.loss)
            disagreements[distance] = errors
        distance, errors = min(disagreements.items(), key=lambda pair: (math.isnan(pair[1].relative), pair[1].relative))
        raise StepsDisagreeError(
            "model: expected products with the Hessian that do not depend on the step of the finite difference, got"
            f" products that differ by {_percent(errors.relative)} between the steps {distance:.2g} and"
            f" {distance / 2:.2g} (tolerance {_percent(self._tolerance)}). The gradient jumps at kinks (ReLU,"
            " max-pooling, a router that chooses other experts), or its precision does not suffice."
        )

    def _errors(self, wide: "_Central", narrow: "_Central", product: Tensor, length: float) -> tuple[StepErrors, float]:
        """Return the errors of a product, and its norm, over all processes."""
        difference = narrow.product - wide.product
        sums = [
            *(one.square().sum(dtype=torch.float64) for one in (difference, product)),
            narrow.squared_gradient,
            *(one.sum(dtype=torch.float64) for one in (narrow.forms, wide.forms, narrow.slopes, wide.slopes)),
            *(torch.tensor(one, dtype=torch.float64) for one in (narrow.quotient, wide.quotient)),
        ]
        squares = self._all_reduce(torch.stack([one.to(product.device) for one in sums])).tolist()
        squared_difference, squared_product, squared_gradient, *pairs = squares
        norm, size = math.sqrt(squared_difference), math.sqrt(squared_product)
        scale = max(self.scale * length, size)
        slope = math.sqrt(squared_gradient) * length / math.sqrt(self._num_parameters)
        return StepErrors(
            difference=norm,
            form=abs(pairs[0] - pairs[1]),
            relative=math.nan if math.isnan(norm) else (norm / scale if scale else 0.0),
            derivative=_derivative_error(pairs[2:], slope),
        ), size

    def _record(self, errors: StepErrors, norm: float, length: float) -> None:
        self.last, self.scale = errors, max(self.scale, norm / length)
        self.largest = max(self.largest[0], errors.relative), max(self.largest[1], errors.difference / length)
        if math.isfinite(errors.derivative):
            known = self.derivative_error if math.isfinite(self.derivative_error) else 0.0
            self.derivative_error = max(known, errors.derivative)


def _extrapolated(narrow: Tensor, wide: Tensor) -> Tensor:
    return (4 * narrow - wide) / 3


@dataclass(frozen=True, eq=False)
class _Central:
    """Central differences over a step, and means over its two ends."""

    product: Tensor
    forms: Tensor
    slopes: Tensor
    quotient: float
    squared_gradient: Tensor
    loss: float


def _central(gradient_at: GradientAt, step: float) -> _Central:
    ahead = gradient_at(step)
    product, forms = ahead.gradient.clone(), ahead.forms.clone()
    behind = gradient_at(-step)
    return _Central(
        product.sub_(behind.gradient).div_(2 * step),
        forms.sub_(behind.forms).div_(2 * step),
        (ahead.forms + behind.forms) / 2,
        (ahead.loss - behind.loss) / (2 * step),
        behind.gradient.square().sum(dtype=torch.float64),
        (ahead.loss + behind.loss) / 2,
    )


def _derivative_error(values: list[float], size: float) -> float:
    """Return the relative difference between a slope and a quotient of the loss, each at steps h/2 and h."""
    slope, quotient = ((4 * inner - outer) / 3 for inner, outer in (values[:2], values[2:]))
    noise = abs(values[2] - values[3]) + abs(values[0] - values[1])
    size = max(abs(quotient), size)
    if size == 0 or noise > _TOO_NOISY * size:
        return 0.0 if size == 0 else math.nan
    return max(abs(slope - quotient) - noise, 0.0) / size


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if not fraction >= 1 else f"{100 * fraction:.0f} %"
