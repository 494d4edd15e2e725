"""Spectral density by stochastic Lanczos quadrature (Golub and Meurant 1994; Lin, Saad and Yang 2016)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.callbacks.functional.curvature.lanczos import LanczosResult
from moe_heads.checks import check_positive

__all__ = ["SpectralDensity", "density_of", "spectral_density"]


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""Density :math:`\rho(\lambda) = \sum_j w_j \, \mathcal N(\lambda; \theta_j, \sigma^2)` of the eigenvalues of H.

    All tensors are float64 on the CPU.

    Attributes:
        grid: Eigenvalues :math:`\lambda` at which the density is given, ascending and equally spaced.
        values: :math:`\rho` there, per unit of eigenvalue; integrates to 1.
        stderr: Standard error of ``values`` from the random start, at most: :math:`\sqrt{2 \rho_2 / (P n)}` for n runs,
            with :math:`\rho_2 = \sum_j w_j \mathcal N(\lambda; \theta_j, \sigma^2)^2` (the variance of Hutchinson's
            estimator of :math:`\operatorname{tr} f(H) / P` is below :math:`2 \operatorname{tr} f(H)^2 / P^2`).
        nodes: Gauss nodes :math:`\theta_j`, the Ritz values.
        weights: Their weights, which sum to 1: :math:`\sum_j w_j f(\theta_j)` estimates
            :math:`\operatorname{tr} f(H) / P` for any function f.
        sigma: Standard deviation of the broadening, in units of eigenvalue.
    """

    grid: Tensor
    values: Tensor
    stderr: Tensor
    nodes: Tensor
    weights: Tensor
    sigma: float


def spectral_density(
    runs: Sequence[LanczosResult], *, sigma: float | None = None, num_points: int = 1024
) -> SpectralDensity:
    """Density from one or more Lanczos runs, each started at an independent Rademacher vector.

    Args:
        runs: Results of `lanczos` on the same operator; each has equal weight. One of 40 steps is enough for a picture:
            the sampling error of one run falls as the square root of the number of parameters.
        sigma: Broadening. By default one hundredth of the range of the nodes: wide enough to join the nodes of the
            bulk, narrow enough to show single outliers.
        num_points: Points of the grid, which reaches five ``sigma`` beyond the outermost nodes.

    Raises:
        ValueError: If there is no run, ``sigma`` is not positive, or the grid is too coarse for ``sigma``.
    """
    if not runs:
        raise ValueError("runs: expected at least one Lanczos run; got none")
    nodes = torch.cat([run.nodes for run in runs])
    weights = torch.cat([run.weights for run in runs]) / len(runs)
    dim = len(runs[0].remainder)
    is_exact = all(len(run.nodes) == dim for run in runs)
    return density_of(nodes, weights, math.inf if is_exact else len(runs) * dim, sigma=sigma, num_points=num_points)


def density_of(
    nodes: Tensor, weights: Tensor, num_signs: float, *, sigma: float | None = None, num_points: int = 1024
) -> SpectralDensity:
    """Density from the nodes and weights of a Gauss quadrature.

    Args:
        nodes: Nodes, float64.
        weights: Their weights, which sum to 1.
        num_signs: Random signs that the starts were made of, for the standard error; infinite where there is no error.
        sigma: See `spectral_density`.
        num_points: See `spectral_density`.

    Raises:
        ValueError: If ``sigma`` is not positive, or the grid is too coarse for it.
    """
    low, high = float(nodes.min()), float(nodes.max())
    if sigma is None:
        # A spectrum of one point, up to rounding, has no range: take its position, or one.
        size = max(abs(low), abs(high))
        sigma = (high - low if high - low > 1e-6 * size else size or 1.0) / 100
    check_positive(sigma=sigma)
    needed = int((high - low + 10 * sigma) / sigma) + 2
    if num_points < needed:
        raise ValueError(f"num_points: expected at least {needed}, one per sigma = {sigma:.3g}; got {num_points}")
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, num_points, dtype=torch.float64)
    # Normalised on the grid, so that the sum over it is one although the tails are cut at five sigma.
    bumps = torch.softmax(-((grid[:, None] - nodes) ** 2) / (2 * sigma**2), dim=0) / (grid[1] - grid[0])
    stderr = (2 * (bumps.square() @ weights) / num_signs).sqrt()
    return SpectralDensity(grid, bumps @ weights, stderr, nodes, weights, sigma)
