"""The Hessian of a mean loss as a linear operator, and the Krylov methods on it."""

from moe_heads.analysis.sharpness.hessian.basis import Basis
from moe_heads.analysis.sharpness.hessian.density import SpectralDensity, spectral_density
from moe_heads.analysis.sharpness.hessian.directional import directional_curvatures
from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult, lanczos
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator, SymmetricOperator
from moe_heads.analysis.sharpness.hessian.output_loss import OutputLoss
from moe_heads.analysis.sharpness.hessian.overlap import subspace_overlap
from moe_heads.analysis.sharpness.hessian.top_eigenvector import top_eigenvector, top_eigenvectors
from moe_heads.analysis.sharpness.hessian.trace import TraceResult, deflated_trace

__all__ = [
    "Basis",
    "HessianOperator",
    "LanczosResult",
    "OutputLoss",
    "SpectralDensity",
    "SymmetricOperator",
    "TraceResult",
    "deflated_trace",
    "directional_curvatures",
    "lanczos",
    "spectral_density",
    "subspace_overlap",
    "top_eigenvector",
    "top_eigenvectors",
]
