"""Analyses that start from the eigenvectors or the samples of a sharpness result, and are reported with it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import LossFn
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.shards import REMEDY, is_sharded
from moe_heads.analysis.loss_landscape.evaluate import can_hold_routing
from moe_heads.analysis.loss_landscape.routing_response import RoutingResponse, has_sparse_router, routing_response
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters
from moe_heads.analysis.sharpness.perturbation import PerturbationSharpnessResult, perturbation_sharpness
from moe_heads.analysis.sharpness.result import SharpnessResult

__all__ = ["check_supplements", "supplemented"]


def check_supplements(
    model: nn.Module, params: Selection | None, *, routing_steps: Sequence[float], perturbation: bool
) -> None:
    """Check before the analysis of all parameters of a sharded model that nothing else was requested.

    Raises:
        ValueError: If an analysis was requested that needs whole parameters.
    """
    if params is not None or not is_sharded(model):
        return
    if perturbation:
        raise ValueError(f"perturbation: expected False for a sharded model, got True. {REMEDY}.")
    if routing_steps and has_sparse_router(model):
        raise ValueError(f"routing_steps: expected () for a sharded model, got {tuple(routing_steps)}. {REMEDY}.")


def supplemented(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Batches,
    result: SharpnessResult,
    *,
    params: Selection | None,
    routing_steps: Sequence[float],
    perturbation: bool,
    seed: int,
    progress: Progress,
    ranks: Ranks,
) -> SharpnessResult:
    """Add the routing response along the first eigenvector, and the perturbation sharpness, to a result.

    A result that is partial stays as it is. Where one of the two ends early, what was found before it is kept.
    """
    has_routing = bool(routing_steps) and has_sparse_router(model)
    if has_routing and not can_hold_routing(model):
        progress.warn(
            "routing_steps: the routing along the first eigenvector was not compared, because a sparse router does not"
            " define rechosen(routing, reference). Define it in the router class, or pass routing_steps=()."
        )
        has_routing = False
    if has_routing and result.eigenvectors is not None and not result.partial:
        progress.keep(partial(_ended, result))
        routing = routing_response(
            model,
            loss_fn,
            batches,
            _over_all_parameters(model, params, result.eigenvectors[0]),
            [sign * step for step in routing_steps for sign in (1, -1)],
            seed=seed,
            progress=progress.part(partial(_with_routing, result)),
            ranks=ranks,
        )
        result = _with_routing(result, routing)
    if perturbation and not result.partial:
        progress.keep(partial(_ended, result))
        found = perturbation_sharpness(
            model,
            loss_fn,
            batches,
            params=params,
            seed=seed,
            progress=progress.part(partial(_with_perturbation, result)),
            ranks=ranks,
        )
        result = _with_perturbation(result, found)
    return result


def _with_routing(result: SharpnessResult, routing: RoutingResponse) -> SharpnessResult:
    return replace(result, routing=routing, partial=routing.partial)


def _with_perturbation(result: SharpnessResult, perturbation: PerturbationSharpnessResult) -> SharpnessResult:
    return replace(result, perturbation=perturbation, partial=perturbation.partial)


def _ended(result: SharpnessResult, reason: str) -> SharpnessResult:
    return replace(result, partial=reason)


def _over_all_parameters(model: nn.Module, params: Selection | None, vector: Tensor) -> Tensor:
    """Extend a vector over the selected parameters by zeros to all parameters that require a gradient."""
    selected = selected_parameters(model, params)
    parts = dict(zip(selected, vector.split([p.numel() for p in selected.values()]), strict=True))
    every = selected_parameters(model, None)
    return torch.cat([parts.get(name, vector.new_zeros(p.numel())) for name, p in every.items()])
