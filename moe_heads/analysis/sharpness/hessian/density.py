"""Spectral density by stochastic Lanczos quadrature (Golub and Meurant 1994; Lin, Saad and Yang 2016)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult
from moe_heads.checks import check_positive

__all__ = ["SpectralDensity", "density_of", "has_settled", "spectral_density"]


# Relative change of the values by cutting the tails beyond five sigma.
_CUT_TAILS = 1e-6

# Number of shorter quadratures to compare the full one with.
_SHORTER = 3

# Largest change of a settled density by its last steps, in standard errors from the random start. It adds 12 % to them.
_SETTLED = 0.5

# Changes below this part of the bump of a single eigenvalue do not count, since the standard error vanishes in gaps.
_OF_ONE_EIGENVALUE = 0.1


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""Density :math:`\rho(\lambda) = \sum_j w_j \, \mathcal N(\lambda; \theta_j, \sigma^2)` of the eigenvalues of H.

    All tensors are float64 on the CPU.

    Attributes:
        grid: Eigenvalues :math:`\lambda` at which the density is given, ascending and equally spaced.
        values: :math:`\rho` there, per unit of eigenvalue; integrates to 1.
        stderr: Standard error of ``values``, from the random start and from the number of steps:
            :math:`\sqrt{2 \rho_2 / (P n) + d^2}` for n runs. The variance of Hutchinson's estimator of
            :math:`\operatorname{tr} f(H) / P` is below :math:`2 \operatorname{tr} f(H)^2 / P^2`, estimated by
            :math:`\rho_2 = \sum_j \max(w_j, 1/P) \, \mathcal N(\lambda; \theta_j, \sigma^2)^2`, because a node stands
            for at least one eigenvalue. d is the largest change of :math:`\rho` without the last 1, 2 or 3 steps.
            Known eigenvalues have the error of their residual instead. 0 if all eigenvalues are known.
        nodes: The known eigenvalues, and the Gauss nodes :math:`\theta_j` of the rest.
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
    """Return the density from one or more Lanczos runs, each started at an independent Rademacher vector.

    If a run certified that it has all eigenvalues above its k-th, these have the weight 1/P each.

    Args:
        runs: Results of `lanczos` on the same operator, with equal weights. One run of 40 steps is enough for a figure,
            because its sampling error is inversely proportional to the square root of the number of parameters.
        sigma: Broadening. By default one hundredth of the range of the nodes: wide enough to join the nodes of the
            bulk, narrow enough to show single outliers.
        num_points: Points of the grid, which reaches five ``sigma`` beyond the outermost nodes.

    Raises:
        ValueError: If there is no run, ``sigma`` is not positive, or the grid is too coarse for ``sigma``.
    """
    if not runs:
        raise ValueError("runs: expected at least one Lanczos run, got none")
    dim = runs[0].dim
    if all(run.is_whole for run in runs):
        nodes = torch.cat([run.ritz[0] for run in runs])
        return density_of(nodes, torch.full_like(nodes, 1 / len(nodes)), math.inf, sigma=sigma, num_points=num_points)
    known = max((run.known_above for run in runs), key=len)
    values = [value for value, _ in known]
    rules = [_rule(runs, left_out, values) for left_out in range(_SHORTER + 1)]
    density = density_of(*rules[0], len(runs) * dim, num_known=len(known), sigma=sigma, num_points=num_points)
    grid, sigma = density.grid, density.sigma
    error = torch.hypot(density.stderr, _largest_change(density, rules[1:]))
    for value, norm in known:
        # Largest change of the bump when its center moves by the residual.
        distance = (grid - value).abs() / sigma
        bump = _bumps(grid, torch.tensor([value], dtype=torch.float64), sigma)[:, 0]
        error = error + bump * (1 + distance) * norm / (sigma * dim)
    return replace(density, stderr=error + _CUT_TAILS * density.values)


def has_settled(run: LanczosResult) -> bool:
    """Return whether the last steps of a run changed its density by less than the error from the random start.

    The changes are compared at each point of the grid, so that the tails count as much as the peak. Then further steps
    improve nothing, and another start vector would.
    """
    if len(run.quadrature) <= _SHORTER:
        return False
    rules = [_rule([run], left_out, []) for left_out in range(_SHORTER + 1)]
    density = density_of(*rules[0], run.dim)
    one = _OF_ONE_EIGENVALUE / (run.dim * density.sigma * math.sqrt(2 * math.pi))
    return bool((_largest_change(density, rules[1:]) <= (_SETTLED * density.stderr).clamp_min(one)).all())


def density_of(
    nodes: Tensor,
    weights: Tensor,
    num_signs: float,
    *,
    num_known: int = 0,
    sigma: float | None = None,
    num_points: int = 1024,
) -> SpectralDensity:
    """Return the density from the nodes and weights of a Gauss quadrature, without the error of the quadrature.

    Args:
        nodes: Nodes, float64.
        weights: Their weights, which sum to 1.
        num_signs: Number of random signs in all start vectors, for the standard error; infinite for exact nodes.
        num_known: Number of leading nodes with exact weights.
        sigma: See `spectral_density`.
        num_points: See `spectral_density`.

    Raises:
        ValueError: If ``sigma`` is not positive, or the grid is too coarse for it.
    """
    low, high = float(nodes.min()), float(nodes.max())
    if sigma is None:
        # A spectrum of one point, up to rounding, has no range, so its position or 1 replaces it.
        size = max(abs(low), abs(high))
        sigma = (high - low if high - low > 1e-6 * size else size or 1.0) / 100
    check_positive(sigma=sigma)
    needed = int((high - low + 10 * sigma) / sigma) + 2
    if num_points < needed:
        raise ValueError(f"num_points: expected at least {needed}, one per sigma = {sigma:.3g}, got {num_points}")
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, num_points, dtype=torch.float64)
    bumps = _bumps(grid, nodes, sigma)
    # A node of the quadrature stands for at least one eigenvalue, however small its part in the start vector is.
    parts = weights.clamp_min(1 / num_signs)
    parts[:num_known] = 0
    stderr = (2 * (bumps.square() @ parts) / num_signs).sqrt()
    return SpectralDensity(grid, bumps @ weights, stderr, nodes, weights, sigma)


def _largest_change(density: SpectralDensity, shorter: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the largest difference of the density from that of shorter quadratures, at each point of the grid."""
    values = [_bumps(density.grid, nodes, density.sigma) @ weights for nodes, weights in shorter]
    return (torch.stack(values) - density.values).abs().amax(0)


def _rule(runs: Sequence[LanczosResult], left_out: int, known: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return nodes and weights without the last steps. Known eigenvalues replace the nodes near them."""
    nodes, weights = [], []
    for run in runs:
        size = max(len(run.quadrature) - left_out, 1)
        values, vectors = torch.linalg.eigh(run.quadrature[:size, :size])
        nodes.append(values)
        weights.append(vectors[0].square() / len(runs))
    node, weight = torch.cat(nodes), torch.cat(weights)
    if not known:
        return node, weight
    # The nodes below the midpoint of the lowest known eigenvalue and the k-th are kept.
    lowest = min(min(known), *[value for run in runs for value in run.eigenvalues])
    is_below = node < (min(known) + lowest) / 2
    share = len(known) / runs[0].dim
    below = weight[is_below]
    exact = torch.tensor(known, dtype=torch.float64)
    total = float(below.sum())
    rest = below * ((1 - share) / total) if total > 0 else below
    return torch.cat([exact, node[is_below]]), torch.cat([torch.full_like(exact, 1 / runs[0].dim), rest])


def _bumps(grid: Tensor, nodes: Tensor, sigma: float) -> Tensor:
    # Normalized on the grid, so that the sum is one although the tails are cut at five sigma.
    return torch.softmax(-((grid[:, None] - nodes) ** 2) / (2 * sigma**2), dim=0) / (grid[1] - grid[0])
