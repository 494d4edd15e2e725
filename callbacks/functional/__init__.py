"""The analyses as plain functions of a model, a loss and batches: no Lightning in here."""

from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.functional.common.preserve import analysis_mode, preserved
from moe_heads.callbacks.functional.common.ranks import Ranks
from moe_heads.callbacks.functional.expert_utilization import expert_utilization
from moe_heads.callbacks.functional.inference_timing import inference_timing
from moe_heads.callbacks.functional.landscape.directions import filter_normalized, random_direction
from moe_heads.callbacks.functional.landscape.result import LossLandscapeResult
from moe_heads.callbacks.functional.loss_landscape import loss_landscape
from moe_heads.callbacks.functional.sharpness import sharpness
from moe_heads.callbacks.functional.sharpness_result import SharpnessResult
from moe_heads.callbacks.functional.timing.result import InferenceTimingResult
from moe_heads.callbacks.functional.timing.row import TimingRow
from moe_heads.callbacks.functional.utilization.result import ExpertUtilizationResult

__all__ = [
    "ExpertUtilizationResult",
    "InferenceTimingResult",
    "LossLandscapeResult",
    "Monitor",
    "Ranks",
    "SharpnessResult",
    "TimingRow",
    "analysis_mode",
    "expert_utilization",
    "filter_normalized",
    "inference_timing",
    "loss_landscape",
    "preserved",
    "random_direction",
    "sharpness",
]
