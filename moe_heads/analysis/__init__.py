"""The analyses as plain functions of a model, a loss and batches: no Lightning in here."""

from moe_heads.analysis._shared.preserve import analysis_mode, preserved
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.function import expert_utilization
from moe_heads.analysis.expert_utilization.metric import ExpertUtilizationMetric
from moe_heads.analysis.expert_utilization.result import ExpertUtilizationResult
from moe_heads.analysis.inference_timing.function import inference_timing
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.row import TimingRow
from moe_heads.analysis.loss_landscape.compare import plot_lines
from moe_heads.analysis.loss_landscape.direction_sweep import direction_sweep, normalized_random_direction
from moe_heads.analysis.loss_landscape.directions import filter_normalized, layer_normalized, random_direction
from moe_heads.analysis.loss_landscape.function import loss_landscape
from moe_heads.analysis.loss_landscape.page import landscape_page
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult
from moe_heads.analysis.loss_landscape.routing_response import routing_response
from moe_heads.analysis.loss_landscape.routing_response_result import RoutingResponse
from moe_heads.analysis.loss_landscape.sweep_result import DirectionSweepResult
from moe_heads.analysis.loss_landscape.trajectory import (
    Trajectory,
    TrajectoryPlane,
    read_states,
    trajectory_plane,
)
from moe_heads.analysis.loss_landscape.validity import CurvatureCheck
from moe_heads.analysis.sharpness.block import BlockCurvature
from moe_heads.analysis.sharpness.function import sharpness
from moe_heads.analysis.sharpness.perturbation.result import PerturbationSharpnessResult
from moe_heads.analysis.sharpness.perturbation_sharpness import perturbation_sharpness
from moe_heads.analysis.sharpness.published.findings import PublishedFindings
from moe_heads.analysis.sharpness.published_sharpness import published_sharpness
from moe_heads.analysis.sharpness.result import SharpnessResult

__all__ = [
    "BlockCurvature",
    "CurvatureCheck",
    "DirectionSweepResult",
    "ExpertUtilizationMetric",
    "ExpertUtilizationResult",
    "InferenceTimingResult",
    "LossLandscapeResult",
    "PerturbationSharpnessResult",
    "Progress",
    "PublishedFindings",
    "Ranks",
    "RoutingResponse",
    "SharpnessResult",
    "TimingRow",
    "Trajectory",
    "TrajectoryPlane",
    "analysis_mode",
    "direction_sweep",
    "expert_utilization",
    "filter_normalized",
    "inference_timing",
    "landscape_page",
    "layer_normalized",
    "loss_landscape",
    "normalized_random_direction",
    "perturbation_sharpness",
    "plot_lines",
    "preserved",
    "published_sharpness",
    "random_direction",
    "read_states",
    "routing_response",
    "sharpness",
    "trajectory_plane",
]
