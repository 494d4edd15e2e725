"""Analyses of a model as plain functions of the model, a loss and batches, without Lightning."""

from typing import TYPE_CHECKING, Any

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.state import preserved
from moe_heads.analysis.critical_sharpness.function import critical_sharpness
from moe_heads.analysis.critical_sharpness.result import CriticalSharpnessResult
from moe_heads.analysis.critical_sharpness.update import update_of
from moe_heads.analysis.expert_utilization.function import expert_utilization
from moe_heads.analysis.expert_utilization.result import ExpertUtilizationResult
from moe_heads.analysis.inference_timing.function import inference_timing
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.rows import TimingRow
from moe_heads.analysis.loss_landscape.compare import plot_lines
from moe_heads.analysis.loss_landscape.direction_sweep import (
    DirectionSweepResult,
    direction_sweep,
    normalized_random_direction,
)
from moe_heads.analysis.loss_landscape.directions import filter_normalized, layer_normalized, random_direction
from moe_heads.analysis.loss_landscape.function import loss_landscape
from moe_heads.analysis.loss_landscape.page import landscape_page
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult
from moe_heads.analysis.loss_landscape.routing_response import RoutingResponse, routing_response
from moe_heads.analysis.loss_landscape.trajectory import (
    Trajectory,
    TrajectoryPlane,
    read_states,
    trajectory_plane,
)
from moe_heads.analysis.loss_landscape.validity import CurvatureCheck
from moe_heads.analysis.sharpness.block import BlockCurvature
from moe_heads.analysis.sharpness.function import sharpness
from moe_heads.analysis.sharpness.perturbation import PerturbationSharpnessResult, perturbation_sharpness
from moe_heads.analysis.sharpness.preconditioned import PreconditionedSharpnessResult, preconditioned_sharpness
from moe_heads.analysis.sharpness.preconditioner import preconditioner_of
from moe_heads.analysis.sharpness.result import SharpnessResult
from moe_heads.analysis.weight_matching.barrier import LineLoss, line_loss
from moe_heads.analysis.weight_matching.function import match_weights
from moe_heads.analysis.weight_matching.result import WeightMatch

if TYPE_CHECKING:
    from moe_heads.analysis.expert_utilization.metric import ExpertUtilizationMetric

__all__ = [
    "BlockCurvature",
    "CriticalSharpnessResult",
    "CurvatureCheck",
    "DirectionSweepResult",
    "ExpertUtilizationMetric",
    "ExpertUtilizationResult",
    "InferenceTimingResult",
    "LineLoss",
    "LossLandscapeResult",
    "PerturbationSharpnessResult",
    "PreconditionedSharpnessResult",
    "Progress",
    "Ranks",
    "RoutingResponse",
    "SharpnessResult",
    "TimingRow",
    "Trajectory",
    "TrajectoryPlane",
    "WeightMatch",
    "analysis_mode",
    "critical_sharpness",
    "direction_sweep",
    "expert_utilization",
    "filter_normalized",
    "inference_timing",
    "landscape_page",
    "layer_normalized",
    "line_loss",
    "loss_landscape",
    "match_weights",
    "normalized_random_direction",
    "perturbation_sharpness",
    "plot_lines",
    "preconditioned_sharpness",
    "preconditioner_of",
    "preserved",
    "random_direction",
    "read_states",
    "routing_response",
    "sharpness",
    "trajectory_plane",
    "update_of",
]


def __getattr__(name: str) -> Any:
    """Import the metric when it is first used, because torchmetrics takes longer to import than the analyses."""
    if name == "ExpertUtilizationMetric":
        from moe_heads.analysis.expert_utilization.metric import ExpertUtilizationMetric

        return ExpertUtilizationMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
