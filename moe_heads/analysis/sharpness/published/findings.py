"""What PyHessian found, and how good it is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads.analysis.sharpness.hessian.basis import norm
from moe_heads.analysis.sharpness.hessian.density import SpectralDensity
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.published.failures import eigenvalue_failures, trace_failures
from moe_heads.analysis.sharpness.published.reach import Reach
from moe_heads.analysis.sharpness.published.run import Returned

__all__ = ["PublishedFindings", "judged"]


@dataclass(frozen=True, eq=False)
class PublishedFindings:
    r"""What PyHessian returned, how far it is from the truth, and what went wrong.

    Attributes:
        eigenvalues: As PyHessian returned them and in its order: deflated power iteration is meant to find the largest
            in absolute value first, but does not always.
        residuals: True relative residuals :math:`\|Hv - \lambda v\| / |\lambda|` of these, computed afterwards by
            `HessianOperator`; infinite where the vector or the eigenvalue is zero.
        eigenvectors: Their vectors scaled to unit length, shape (number of eigenvalues, P), on the CPU, in the order of
            ``parameter_names``.
        trace: Trace of H, the mean of the samples :math:`z^T H z` of PyHessian's Hutchinson estimator.
        trace_stderr: Its standard error, from the spread of these samples; infinite for a single one.
        num_probes: Number of these samples.
        density: Density of all eigenvalues from PyHessian's Gauss nodes and weights, broadened as in
            `spectral_density`; None when not asked for or not to be had.
        num_products: Hessian-vector products that PyHessian spent, each over all samples.
        num_power_steps: Those of them that went into the eigenvalues.
        num_check_products: Products of `HessianOperator`: one before PyHessian starts, and one for each residual.
        num_samples: Samples of the loss.
        parameter_names: The parameters in the order of the flat vectors, that of ``model.named_parameters()``.
        failures: One sentence for each thing that went wrong or had to be worked around; the word before the colon
            says where: "order", "sign", "residual", "trace", "density", "idle parameter" or "linear parameter".
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    eigenvectors: Tensor
    trace: float
    trace_stderr: float
    num_probes: int
    density: SpectralDensity | None
    num_products: int
    num_power_steps: int
    num_check_products: int
    num_samples: int
    parameter_names: tuple[str, ...]
    failures: tuple[str, ...]


def judged(returned: Returned, operator: HessianOperator, reach: Reach) -> PublishedFindings:
    """What PyHessian returned, with the true residuals by ``operator`` and all that went wrong."""
    flat = torch.stack([torch.cat([part.detach().reshape(-1) for part in vector]) for vector in returned.vectors])
    vectors = F.normalize(flat, eps=torch.finfo(flat.dtype).tiny).to(operator.dtype)
    residuals = tuple(
        _residual(operator, value, vector) for value, vector in zip(returned.eigenvalues, vectors, strict=True)
    )
    samples = torch.tensor(returned.samples, dtype=torch.float64)
    trace = float(samples.mean())
    stderr = float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else math.inf
    failures = [
        *eigenvalue_failures(returned.eigenvalues, residuals),
        *trace_failures(returned.samples, trace, stderr),
        *reach.failures(),
        *([returned.density_failure] if returned.density_failure else []),
    ]
    return PublishedFindings(
        eigenvalues=tuple(returned.eigenvalues),
        residuals=residuals,
        eigenvectors=vectors.cpu(),
        trace=trace,
        trace_stderr=stderr,
        num_probes=len(returned.samples),
        density=returned.density,
        num_products=returned.num_products,
        num_power_steps=returned.num_power_steps,
        num_check_products=operator.num_products,
        num_samples=operator.num_samples,
        parameter_names=operator.names,
        failures=tuple(failures),
    )


def _residual(operator: HessianOperator, value: float, vector: Tensor) -> float:
    if value == 0 or not bool(vector.any()):
        return math.inf
    return norm(operator.matvec(vector) - value * vector) / abs(value)
