"""Lightning callbacks that analyze the trained model at the end of fit, and their monitor for other loops."""

from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.options import AnalysisOptions
from moe_heads.callbacks._shared.reporting import Mesh, Report
from moe_heads.callbacks.base import FitEndAnalysis
from moe_heads.callbacks.critical_sharpness import CriticalSharpnessCallback
from moe_heads.callbacks.expert_utilization import ExpertUtilizationCallback
from moe_heads.callbacks.inference_timing import InferenceTimingCallback
from moe_heads.callbacks.loop import TrainingMonitor
from moe_heads.callbacks.loss_landscape import Landscape, LossLandscapeCallback
from moe_heads.callbacks.sharpness import SharpnessCallback

__all__ = [
    "AnalysisInputs",
    "AnalysisOptions",
    "CriticalSharpnessCallback",
    "ExpertUtilizationCallback",
    "FitEndAnalysis",
    "InferenceTimingCallback",
    "Landscape",
    "LossLandscapeCallback",
    "Mesh",
    "Report",
    "SharpnessCallback",
    "TrainingMonitor",
]
