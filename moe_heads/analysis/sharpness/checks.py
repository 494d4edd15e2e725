"""Checks of a sharpness result on its own model and samples."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_heads.analysis._shared.mean_check import CutDependence
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.certificate import Certificate
from moe_heads.analysis.sharpness.hessian.basis import uniform
from moe_heads.analysis.sharpness.hessian.difference_operator import DifferenceOperator
from moe_heads.analysis.sharpness.hessian.double_check import DoubleCheck, check_in_double
from moe_heads.analysis.sharpness.hessian.gradient_differences import StepsDisagreeError
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.trace import Places
from moe_heads.analysis.sharpness.hessian.weighted_sum import WeightedSum
from moe_heads.analysis.sharpness.hessian.whole_differences import WholeDifferences

__all__ = ["certified", "from_krylov"]

_IN_DOUBLE = (
    "products in float64",
    "gradient against finite difference",
    "product against finite difference",
    "loss is deterministic",
)

# Largest relative difference between products with two steps that still shows a wrong product.
_CLEAR = 1e-2


def from_krylov(
    krylov: LanczosResult, dependence: CutDependence, center_loss: float, *, is_complete: bool | None = None
) -> Certificate:
    """Return the checks that need no further product: those of the Lanczos iteration and of the loss.

    Args:
        krylov: Result of the iteration.
        dependence: Change of the loss when batches are halved.
        center_loss: Mean loss over the samples.
        is_complete: Whether no eigenvalue is missing, where that is not the result of the iteration alone.
    """
    is_complete = krylov.is_complete if is_complete is None else is_complete
    scale = float(krylov.projected.abs().max())
    resolution = torch.finfo(krylov.basis.dtype).eps
    unchecked = {} if is_complete else {"no eigenvalue missing": "the steps ended first"}
    if dependence.size is None:
        unchecked["loss is a mean over samples"] = dependence.reason
    return Certificate(
        asymmetry=krylov.asymmetry / scale if scale else 0.0,
        is_complete=is_complete,
        scale=scale,
        negligible=100 * resolution * max(abs(center_loss), resolution),
        cut_dependence=math.nan if dependence.size is None else dependence.size,
        dtype=str(krylov.basis.dtype).removeprefix("torch."),
        unchecked={
            **unchecked,
            **dict.fromkeys(_IN_DOUBLE, "the analysis ended first"),
        },
    )


def certified(
    certificate: Certificate,
    operator: WeightedSum,
    krylov: LanczosResult,
    blocks: Places | None,
    seed: int,
    progress: Progress,
    lower: LanczosResult | None = None,
    *,
    skipped: str = "",
) -> Certificate:
    """Return the certificate with the checks in float64, made on a part of this process's samples.

    ``lower`` is the iteration at the lower end of the spectrum, if there was one. ``blocks`` is None without a trace,
    whose rounding is then not measured. ``skipped`` is the reason for which the checks are left out, if they are.

    Products that are differences of gradients were checked one by one. Their errors count as rounding.
    A product of a custom autograd function that cannot be evaluated in float64 is compared with such a difference.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(operator, DifferenceOperator):
        return _of_differences(certificate, operator, blocks, generator)
    assert isinstance(operator, HessianOperator)
    if skipped:
        return replace(certificate, unchecked={**certificate.unchecked, **dict.fromkeys(_IN_DOUBLE, skipped)})
    # The eigenvalues of the result are the k largest and the smallest.
    ends = [(krylov, krylov.coefficients)]
    ends += [(krylov, krylov.ritz[1][:, :1].T)] if lower is None else [(lower, lower.coefficients)]
    signs = torch.randint(0, 2, (1, sum(len(rows) for _, rows in ends)), generator=generator).double() * 2 - 1
    along_all = torch.zeros(operator.num_parameters, dtype=operator.dtype, device=operator.device)
    for (end, rows), chosen in zip(ends, signs.split([len(rows) for _, rows in ends], dim=1), strict=True):
        along_all += end.basis.combined(chosen @ rows)[0]

    def drawn() -> Tensor:
        return uniform(operator.num_parameters, operator.dtype, operator.device, generator)

    vectors = [along_all] if blocks is None else [along_all, drawn()]
    del along_all
    found = check_in_double(operator.gradients, operator.data, vectors, progress, seed)
    others = {name: reason for name, reason in certificate.unchecked.items() if name not in _IN_DOUBLE}
    if not isinstance(found, DoubleCheck):
        unchecked = {**others, **dict.fromkeys(_IN_DOUBLE, found)}
        error = (
            math.nan
            if progress.end and found.startswith(progress.end)
            else _silent_error(operator, vectors[1] if len(vectors) > 1 else drawn(), seed)
        )
        if not math.isnan(error):
            del unchecked["product against finite difference"]
        return replace(certificate, curvature_error=error, unchecked=unchecked)
    nothing = torch.zeros_like(found.direction)
    along, sampled = (*found.differences, nothing, nothing)[:2]

    def trace_error(places: Sequence[slice]) -> float:
        rounding = _trace_error(vectors[1], sampled, along, places)
        wrong = _trace_error(found.direction, found.product_difference, torch.zeros_like(along), places)
        return math.hypot(rounding, wrong)

    for name, error in (("gradient", found.derivative_error), ("product", found.curvature_error)):
        if math.isnan(error):
            others[f"{name} against finite difference"] = "differences at two step sizes disagree, as in float32"
    if not found.differences:
        others["products in float64"] = "the loss draws random numbers, which differ in float64"
    return replace(
        certificate,
        rounding=2 * float(along.norm()) if found.differences else math.nan,
        trace_rounding=math.nan if blocks is None else trace_error([slice(None)]),
        block_rounding={name: trace_error(places) for name, places in (blocks or {}).items()},
        derivative_error=found.derivative_error,
        curvature_error=found.curvature_error,
        product_error=float(found.product_difference.norm()),
        repeat_error=found.repeat_error,
        num_double=found.num_samples,
        unchecked=others,
    )


def _silent_error(operator: HessianOperator, probe: Tensor, seed: int) -> float:
    """Return the relative difference of a product from differences of gradients in the model's own precision.

    It is measured for models with a custom autograd function alone, whose gradient torch may take for a constant. nan
    for other models, and where two steps disagree.
    """
    gradients = operator.gradients
    if not gradients.has_custom_function(operator.data.origins[0], next(iter(operator.data))):
        return math.nan
    differences = WholeDifferences(
        gradients.model,
        gradients.loss_fn,
        operator.data,
        list(gradients.params.values()),
        tolerance=_CLEAR,
        seed=seed,
        in_double=False,
    )
    size = operator.num_parameters
    try:
        quotient = differences.sample_sum(probe)[:size]
    except StepsDisagreeError:
        return math.nan
    product = operator.sample_sum(probe)[:size]
    assert differences.differences.last is not None
    error = float((product - quotient).norm()) / max(float(product.norm()), float(quotient.norm()), 1e-300)
    return max(error - 2 * differences.differences.last.relative, 0.0)


def _of_differences(
    certificate: Certificate,
    operator: DifferenceOperator,
    blocks: Places | None,
    generator: torch.Generator,
) -> Certificate:
    differences, wide = operator.differences, math.nan
    weight = operator.difference_weight
    if blocks is not None:
        operator.matvec(uniform(operator.num_parameters, operator.dtype, operator.device, generator))
        assert differences.last is not None
        # as in `_trace_error`, for the difference between the two steps
        wide = math.hypot(differences.last.form, math.sqrt(2) * differences.last.difference) / weight
    others = {name: reason for name, reason in certificate.unchecked.items() if name not in _IN_DOUBLE}
    others |= {
        "products in float64": "the products are finite differences of gradients, no exact derivatives",
        "product against finite difference": "the products are such differences",
    }
    if math.isnan(differences.derivative_error):
        others["gradient against finite difference"] = "differences at two step sizes disagree, as in float32"
    return replace(
        certificate,
        rounding=2 * differences.largest[1] / weight,
        trace_rounding=wide,
        block_rounding=dict.fromkeys(blocks or (), wide),
        derivative_error=differences.derivative_error,
        step_error=differences.largest[0],
        repeat_error=operator.repeat_error,
        unchecked=others,
    )


def _trace_error(probe: Tensor, sampled: Tensor, along: Tensor, places: Sequence[slice]) -> float:
    """Return the error of the trace of a diagonal block, for D the difference of two H.

    Args:
        probe: Random numbers z of variance 1.
        sampled: Dz.
        along: Dw for the sum w of eigenvectors, where most of D may be.
        places: The block.
    """
    # z^T D z is one sample of the error, with a variance of about 2 ‖D‖_F^2
    form = sum(float(probe[place].to(sampled.dtype) @ sampled[place]) for place in places)
    squares = [sum(float(part[place].square().sum()) for place in places) for part in (sampled, along)]
    return math.sqrt(form**2 + 2 * squares[0] + 4 * squares[1])
