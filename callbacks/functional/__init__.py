"""The analyses as plain functions of a model, a loss and batches: no Lightning in here."""

from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.functional.common.preserve import analysis_mode, preserved
from moe_heads.callbacks.functional.common.ranks import Ranks
from moe_heads.callbacks.functional.direction_sweep import direction_sweep, normalized_random_direction
from moe_heads.callbacks.functional.expert_utilization import expert_utilization
from moe_heads.callbacks.functional.inference_timing import inference_timing
from moe_heads.callbacks.functional.landscape.compare import plot_lines
from moe_heads.callbacks.functional.landscape.directions import filter_normalized, layer_normalized, random_direction
from moe_heads.callbacks.functional.landscape.page import landscape_page
from moe_heads.callbacks.functional.landscape.result import LossLandscapeResult
from moe_heads.callbacks.functional.landscape.sweep_result import DirectionSweepResult
from moe_heads.callbacks.functional.landscape.trajectory import (
    Trajectory,
    TrajectoryPlane,
    read_states,
    trajectory_plane,
)
from moe_heads.callbacks.functional.landscape.validity import CurvatureCheck
from moe_heads.callbacks.functional.loss_landscape import loss_landscape
from moe_heads.callbacks.functional.perturbation.result import PerturbationSharpnessResult
from moe_heads.callbacks.functional.perturbation_sharpness import perturbation_sharpness
from moe_heads.callbacks.functional.published.findings import PublishedFindings
from moe_heads.callbacks.functional.published_sharpness import published_sharpness
from moe_heads.callbacks.functional.routing_response import routing_response
from moe_heads.callbacks.functional.routing_response_result import RoutingResponse
from moe_heads.callbacks.functional.sharpness import sharpness
from moe_heads.callbacks.functional.spectrum.block import BlockCurvature
from moe_heads.callbacks.functional.spectrum.result import SharpnessResult
from moe_heads.callbacks.functional.timing.result import InferenceTimingResult
from moe_heads.callbacks.functional.timing.row import TimingRow
from moe_heads.callbacks.functional.utilization.metric import ExpertUtilizationMetric
from moe_heads.callbacks.functional.utilization.result import ExpertUtilizationResult

__all__ = [
    "BlockCurvature",
    "CurvatureCheck",
    "DirectionSweepResult",
    "ExpertUtilizationMetric",
    "ExpertUtilizationResult",
    "InferenceTimingResult",
    "LossLandscapeResult",
    "Monitor",
    "PerturbationSharpnessResult",
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
