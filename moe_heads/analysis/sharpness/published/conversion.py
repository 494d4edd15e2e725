"""PyHessian's findings in the form of our own."""

import math

import torch
from torch import Tensor, nn

from moe_heads.analysis.sharpness.block import BlockCurvature
from moe_heads.analysis.sharpness.hessian.blocks import default_blocks, places_of
from moe_heads.analysis.sharpness.hessian.parameters import selected_parameters, slices_of
from moe_heads.analysis.sharpness.published.failures import RESIDUAL_LIMIT, TRACE_LIMIT
from moe_heads.analysis.sharpness.published.findings import PublishedFindings
from moe_heads.analysis.sharpness.result import SharpnessResult

__all__ = ["as_sharpness_result"]


def as_sharpness_result(found: PublishedFindings, model: nn.Module, seed: int) -> SharpnessResult:
    """What PyHessian found, so that it is logged and drawn under the same names as our own results.

    What it does not give is nan; "converged" says whether the true residuals are within 1e-3 and the standard error of
    the trace within 5 %.

    Args:
        found: PyHessian's findings.
        model: The model they are about, for the blocks.
        seed: The seed they were made with.
    """
    slices = slices_of(selected_parameters(model, list(found.parameter_names)))
    places = places_of(default_blocks(model, slices), slices)
    return SharpnessResult(
        eigenvalues=found.eigenvalues,
        residuals=found.residuals,
        lambda_min=math.nan,
        lambda_min_residual=math.nan,
        trace=found.trace,
        trace_stderr=found.trace_stderr,
        frobenius_norm=math.nan,
        density=found.density,
        blocks={name: _shares(found.eigenvectors, place) for name, place in places.items()},
        experts={},
        num_steps=found.num_power_steps,
        num_probes=found.num_probes,
        num_products=found.num_products,
        num_samples=found.num_samples,
        num_parameters=found.eigenvectors.shape[1],
        eigenvalues_converged=max(found.residuals) <= RESIDUAL_LIMIT,
        trace_converged=found.trace_stderr <= TRACE_LIMIT * abs(found.trace),
        graph_mode="rebuilt",
        seed=seed,
        parameter_names=found.parameter_names,
        eigenvectors=found.eigenvectors,
        engine="pyhessian",
        failures=found.failures,
    )


def _shares(vectors: Tensor, places: list[slice]) -> BlockCurvature:
    squares = sum(
        (vectors[:, place].square().sum(1, dtype=torch.float64) for place in places), torch.zeros(len(vectors))
    )
    return BlockCurvature(
        num_parameters=sum(place.stop - place.start for place in places),
        shares=tuple(squares.tolist()),
        trace=math.nan,
        trace_stderr=math.inf,
    )
