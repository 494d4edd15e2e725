"""Checks of a sharpness result on its own input."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["Certificate"]

# Largest relative error of a directional derivative that rounding and kinks explain.
_SAME_DERIVATIVE = 1e-2

# Largest asymmetry, relative to the norm of the matrix, that rounding explains.
_SYMMETRIC = {"float32": 1e-3, "float64": 1e-8}

# Largest relative difference of a loss from itself that the order of sums on several threads explains, in float64.
_SAME_LOSS = 1e-9

# The relative error of the gradient is the largest along three random directions, and may be larger along others.
_PER_DIRECTION = 2

# Largest asymmetry in units of the measured rounding: the two are measured along different vectors.
_PER_ROUNDING = 100


@dataclass(frozen=True)
class Certificate:
    r"""Errors measured on the model and the samples of a result.

    Attributes:
        asymmetry: Norm of the antisymmetric part of the products on the Krylov space, over the norm of H there. It is
            rounding, unless the gradient is not the derivative of a loss.
        rounding: Contribution of rounding to each residual, in units of an eigenvalue; nan if it was not measured. It
            is twice the length of the difference between :math:`Hw` as computed and in float64, for w the sum of the
            unit eigenvectors with random signs.
        trace_rounding: Error of the trace from rounding and from ``product_error``, estimated with random vectors. If
            rounding was not measured, from ``product_error`` alone. nan without a trace.
        block_rounding: The same for the trace of each block of parameters, by its key.
        derivative_error: Relative difference between the gradient and a finite difference of the loss along random
            directions, in float64.
        curvature_error: Relative difference between a product and a finite difference of the gradient, in float64.
        product_error: The same difference for a random vector with entries of size 1, an estimate of its Frobenius
            norm; 0 if rounding explains it.
        step_error: Largest relative difference between products from differences of gradients with the steps h and
            h/2; nan for products by double backward.
        repeat_error: Relative difference of the loss when it is evaluated a second time in the same way.
        num_double: Number of samples evaluated in float64.
        scale: Norm of H on the Krylov space, up to a factor of three.
        negligible: Curvature that rounding explains for a loss of this size, a hundred units in the last place.
        cut_dependence: Relative change of the loss when batches are halved; 0 up to rounding for a mean over samples.
        is_complete: Whether a search from a new random vector found no missing eigenvalue above the last one.
        dtype: Data type of the parameters.
        unchecked: Reason for each check that was not made, by its name.
    """

    asymmetry: float = 0.0
    rounding: float = math.nan
    trace_rounding: float = math.nan
    block_rounding: Mapping[str, float] = field(default_factory=dict)
    derivative_error: float = math.nan
    curvature_error: float = math.nan
    product_error: float = 0.0
    step_error: float = math.nan
    repeat_error: float = math.nan
    num_double: int = 0
    scale: float = 0.0
    negligible: float = 0.0
    cut_dependence: float = math.nan
    is_complete: bool = False
    dtype: str = "float32"
    unchecked: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_symmetric(self) -> bool:
        """True if the products are those of a symmetric matrix, up to rounding."""
        limit = _SYMMETRIC.get(self.dtype, 1e-3)
        if math.isfinite(self.rounding) and self.scale > 0:
            limit = max(limit, _PER_ROUNDING * self.rounding / self.scale)
        return self.asymmetry <= limit or self.asymmetry * self.scale <= self.negligible

    @property
    def is_derivative(self) -> bool:
        """True if the gradient passed the comparison with a finite difference of the loss, or was not compared."""
        return not self.derivative_error > _SAME_DERIVATIVE

    @property
    def is_second_derivative(self) -> bool:
        """True if a product passed the comparison with a finite difference of the gradient, or was not compared."""
        return not self.curvature_error > _SAME_DERIVATIVE

    @property
    def is_repeatable(self) -> bool:
        """True if the loss had the same value twice, or was not compared."""
        return not self.repeat_error > _SAME_LOSS

    @property
    def is_hessian(self) -> bool:
        """True if no check showed that the products differ from those of the loss's Hessian."""
        return self.is_repeatable and self.is_symmetric and self.is_derivative and self.is_second_derivative

    @property
    def is_in_range(self) -> bool:
        """True if the squares of the curvatures neither underflow nor overflow in the data type of the parameters."""
        limits = torch.finfo(getattr(torch, self.dtype))
        # the upper limit leaves room for sums of squares
        return self.scale == 0 or limits.tiny < self.scale**2 < limits.eps * limits.max

    def error_of_derivatives(self, value: float) -> float:
        """Return the error of an eigenvalue, or a trace without ``product_error``, from wrong derivatives."""
        relative = self.derivative_error if math.isfinite(self.derivative_error) else 0.0
        return self.product_error + _PER_DIRECTION * relative * abs(value)

    def metrics(self) -> dict[str, float]:
        """Return the measured errors by name."""
        of_steps = {} if math.isnan(self.step_error) else {"step_error": self.step_error}
        return {
            **of_steps,
            "asymmetry": self.asymmetry,
            "rounding": self.rounding,
            "trace_rounding": self.trace_rounding,
            "derivative_error": self.derivative_error,
            "curvature_error": self.curvature_error,
            "cut_dependence": self.cut_dependence,
        }

    def warnings(self) -> list[str]:
        """Return a message for each failed check."""
        if not self.is_repeatable:
            # wrong derivatives are a consequence
            return [
                f"The loss changes by {self.repeat_error:.1g} when it is evaluated again in the same way, so no result"
                " is certified. Look for random numbers outside torch (random, numpy), counters, and buffers that the"
                " forward pass updates."
            ]
        found = []
        if not self.is_symmetric:
            found.append(
                f"The products are not symmetric: ⟨u, Hv⟩ and ⟨Hu, v⟩ differ by {self.asymmetry:.1g} of the norm of H,"
                " so no result is certified. They are not the second derivatives of a loss. Look for a custom"
                " backward, a detach() in the loss, a checkpoint that loses a part of the model, or an operation whose"
                " second derivative torch gets wrong (its weight_norm)."
            )
        if not self.is_derivative:
            found.append(
                "The gradient is not the derivative of the loss: along a random direction it differs from a finite"
                f" difference of the loss by {self.derivative_error:.0%}, so no result is certified. Look for a custom"
                " backward (such as a straight-through estimator), a detach() in the loss, a reentrant checkpoint, or"
                " parameters that are used without a graph."
            )
        if self.is_derivative and self.is_symmetric and not self.is_second_derivative:
            found.append(
                "The products are not the derivative of the gradient: along a random direction they differ from a"
                f" finite difference of the gradient by {self.curvature_error:.0%}, so no result is certified. Look for"
                " a custom autograd function whose backward uses values saved without a graph, and for differences of"
                " large numbers, whose rounding looks the same."
            )
        return found

    def rows(self) -> list[tuple[str, str]]:
        """Return table rows of the checks, with the measured error or the reason why there is none."""
        samples = f" ({self.num_double} samples)" if self.num_double else ""
        in_trace = f", {self.trace_rounding:.1e} in the trace" if math.isfinite(self.trace_rounding) else ""
        values = {
            "symmetric products": f"{self.asymmetry:.1e} of the norm of H",
            "products in float64": f"{self.rounding:.1e} in λ{in_trace}{samples}",
            "gradient against finite difference": f"{self.derivative_error:.1e}{samples}",
            "product against finite difference": f"{self.curvature_error:.1e}{samples}",
            "product with half the step": f"{self.step_error:.1e}",
            "loss is deterministic": f"{self.repeat_error:.1e} when it is evaluated again",
            "loss is a mean over samples": f"{self.cut_dependence:.1e} when batches are halved",
            "no eigenvalue missing": "none found from a new random vector",
        }
        there = {
            "symmetric products": True,
            "products in float64": math.isfinite(self.rounding) and "products in float64" not in self.unchecked,
            "gradient against finite difference": math.isfinite(self.derivative_error),
            "product against finite difference": math.isfinite(self.curvature_error),
            "product with half the step": math.isfinite(self.step_error),
            "loss is deterministic": math.isfinite(self.repeat_error),
            "loss is a mean over samples": math.isfinite(self.cut_dependence),
            "no eigenvalue missing": self.is_complete,
        }
        rows = [(name, values[name]) for name, is_there in there.items() if is_there]
        return rows + [(name, f"not checked: {self.unchecked[name]}") for name in there if name in self.unchecked]
