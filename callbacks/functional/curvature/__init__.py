"""Curvature of a loss: the Hessian as an operator, and what Krylov methods read off it."""

from moe_heads.callbacks.functional.curvature.basis import Basis
from moe_heads.callbacks.functional.curvature.density import SpectralDensity, spectral_density
from moe_heads.callbacks.functional.curvature.directional import directional_curvatures
from moe_heads.callbacks.functional.curvature.lanczos import LanczosResult, lanczos
from moe_heads.callbacks.functional.curvature.operator import HessianOperator, SymmetricOperator
from moe_heads.callbacks.functional.curvature.overlap import subspace_overlap
from moe_heads.callbacks.functional.curvature.top_eigenvector import top_eigenvector, top_eigenvectors
from moe_heads.callbacks.functional.curvature.trace import TraceResult, deflated_trace

__all__ = [
    "Basis",
    "HessianOperator",
    "LanczosResult",
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
