"""Norm and stable rank of the weights of each expert of a router.

Shapes: E experts, M weight matrices of an expert, each O by I. B experts of a piece, S steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis.expert_utilization.expert_weights import ExpertWeights, UnknownExpertsError, find_experts

__all__ = ["WeightHealth", "measure_weights", "relative_to_median", "weights_of_routers"]

# Elements of the copy in float32 that exists at a time. On a GPU 64 MiB. On a CPU batched products with one vector are
# up to five times slower than those of single matrices, unless the matrices are small.
_MAX_ELEMENTS, _MAX_ELEMENTS_ON_CPU = 2**24, 2**16

# Smaller side up to which all singular values are computed.
_MAX_EXACT = 64

# Steps of the Krylov method. The measured error is in docs/results.md.
_NUM_STEPS = 16


@dataclass(frozen=True, eq=False)
class WeightHealth:
    r"""Norm and stable rank of every weight matrix of every expert, float64 on the CPU. Biases are not included.

    Attributes:
        norms: Frobenius norms, (E, M).
        stable_ranks: :math:`\|W\|_F^2 / \|W\|_2^2`, (E, M), from 1 to the rank, and 0 for a matrix of zeros. The
            largest singular value is exact if a side has at most 64 rows. Else it is a lower bound from 16 steps of a
            Krylov method, and the stable rank too large, by at most 2.4 % in the measurements of docs/results.md.
    """

    norms: Tensor
    stable_ranks: Tensor

    @property
    def relative_norms(self) -> Tensor:
        """Norms in units of the median of the layer, (E,), the smallest over the matrices of the expert.

        A signal passes all matrices of an expert, so the weakest one decides. The norm of all matrices together would
        stay at 70 % for an expert whose second of two matrices is zero.
        """
        return relative_to_median(self.norms).amin(1)

    @property
    def relative_stable_ranks(self) -> Tensor:
        """Stable ranks in units of the median of the layer, (E,), the smallest over the matrices of the expert."""
        return relative_to_median(self.stable_ranks).amin(1)

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log while training, without those that are not finite."""
        lowest = {"weight_norm_min": self.relative_norms.min(), "stable_rank_min": self.relative_stable_ranks.min()}
        return {key: float(value) for key, value in lowest.items() if value.isfinite()}


def relative_to_median(values: Tensor) -> Tensor:
    """Divide nonnegative values (E, ...) by their median over the E experts.

    Zeros stay zero, also if the median is zero. The median of an even number of values is the mean of the two in the
    middle. All values are nan if one is.
    """
    medians = values.quantile(0.5, dim=0, keepdim=True)
    return torch.where((values == 0) & ~medians.isnan(), 0, values / medians)


def weights_of_routers(model: nn.Module, routers: Mapping[str, tuple[nn.Module, int]]) -> dict[str, WeightHealth]:
    """Measure the experts of routers, by name. Routers whose experts are not known are left out.

    Args:
        model: Model that contains the routers.
        routers: Each router with its number of experts.
    """
    found = {}
    for name, (router, num_experts) in routers.items():
        try:
            found[name] = measure_weights(find_experts(model, router, num_experts))
        except UnknownExpertsError:
            continue
    return found


@torch.no_grad()
def measure_weights(experts: ExpertWeights) -> WeightHealth:
    """Measure the weights of experts in float32, a piece at a time, without the random number generators of torch.

    Args:
        experts: The experts.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.expert_utilization.expert_weights import ExpertWeights
        >>> stack = torch.diag_embed(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> health = measure_weights(ExpertWeights(torch.nn.Identity(), (), {"weight": stack}))
        >>> health.norms.flatten().tolist(), health.stable_ranks.flatten().tolist()
        ([5.0, 1.0], [1.5625, 1.0])
    """
    norms, largest = [], []
    for name, found in experts.matrices.items():
        num_experts, on_cpu = len(found), found[0].device.type == "cpu"
        per_piece = max(1, (_MAX_ELEMENTS_ON_CPU if on_cpu else _MAX_ELEMENTS) // max(1, found[0].numel()))
        pieces = [
            _norms_of(_as_float32(experts.stack(name, start, min(start + per_piece, num_experts))))
            for start in range(0, num_experts, per_piece)
        ]
        norms.append(torch.cat([piece[0] for piece in pieces]))
        largest.append(torch.cat([piece[1] for piece in pieces]))
    frobenius, spectral = torch.stack(norms, 1), torch.stack(largest, 1)
    return WeightHealth(frobenius, torch.where(frobenius == 0, 0, (frobenius / spectral).square()))


def _as_float32(weights: Tensor) -> Tensor:
    # the widest type that every device has
    return weights.to(torch.float32)


def _norms_of(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Frobenius norms and the largest singular values of matrices (B, O, I), each (B,), float64, CPU."""
    # the squares of numbers below 1e-19 are zero in float32
    scales = weights.abs().amax((1, 2), keepdim=True)
    scaled = torch.where(scales > 0, weights / scales, 0) if weights.numel() else weights
    if scaled.shape[1] < scaled.shape[2]:
        scaled = scaled.transpose(1, 2)
    # row by row: a sum of millions of squares in float32 is wrong in the fourth digit
    frobenius = torch.linalg.vector_norm(torch.linalg.vector_norm(scaled, dim=2).cpu().double(), dim=1)
    images = scaled if scaled.shape[2] <= _MAX_EXACT else torch.bmm(scaled, _krylov_basis(scaled))
    wide = images.cpu().double()
    gram = wide.mT @ wide
    # eigvalsh raises an error for a matrix with nan
    finite = gram.isfinite().all(-1).all(-1)
    squares = torch.linalg.eigvalsh(torch.where(finite[:, None, None], gram, 0))[:, -1]
    spectral = torch.where(finite, squares.clamp_min(0).sqrt(), torch.nan)
    # a lower bound may exceed the Frobenius norm by rounding if the matrix has rank one
    back = scales.flatten().cpu().double()
    return frobenius * back, torch.minimum(spectral, frobenius) * back


def _krylov_basis(weights: Tensor) -> Tensor:
    """Return orthonormal bases (B, I, S) of the Krylov spaces of WᵀW for W (B, O, I), from a fixed random start.

    Columns are zero once a space is exhausted, as for a matrix of low rank.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(weights.shape[2], 1, generator=generator).to(weights.device)
    basis: Tensor = (start / start.norm()).expand(len(weights), -1, -1)
    eps = torch.finfo(weights.dtype).eps
    for _ in range(_NUM_STEPS - 1):
        new = torch.bmm(weights.mT, torch.bmm(weights, basis[..., -1:]))
        size = new.norm(dim=1, keepdim=True)
        for _ in range(2):  # the second time removes what rounding left
            new = new - torch.bmm(basis, torch.bmm(basis.mT, new))
        left = new.norm(dim=1, keepdim=True)
        # what is as small as the rounding error has no direction
        new = torch.where(left > 10 * eps * size, new / left, 0)
        basis = torch.cat([basis, new], 2)
    return basis
