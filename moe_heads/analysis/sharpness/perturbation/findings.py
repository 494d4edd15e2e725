"""What a perturbation sharpness analysis has found so far."""

import math
from dataclasses import dataclass, field

import torch

from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.perturbation.result import Norm, PerturbationSharpnessResult

__all__ = ["Findings"]


@dataclass
class Findings:
    """What an analysis has found so far; filled on rank zero."""

    average_radius: float
    radius: float
    norm: Norm
    adaptive: bool
    num_parameters: int
    num_fixed: int
    seed: int
    num_draws: int
    num_steps: int
    progress: Progress
    center_loss: float = math.nan
    num_samples: int = 0
    rises: list[float] = field(default_factory=list)
    sam: float = math.nan
    worst: float = math.nan
    gradient_norm: float = math.nan
    num_evaluations: int = 0
    num_gradients: int = 0
    num_nonfinite: int = 0

    def step(self) -> None:
        """Say that one more step is done: the center, a pair of draws, a gradient."""
        self.progress.keep(self.result)
        average, stderr = self.average()
        done = min(self.num_evaluations, 1) + len(self.rises) + self.num_gradients
        found = {"average": average, "stderr": stderr, "worst": self.worst}
        known = {name: value for name, value in found.items() if math.isfinite(value)}
        self.progress.step(done, 3 + self.num_draws + self.num_steps, **known)

    def average(self) -> tuple[float, float]:
        """Mean of the draws and its standard error."""
        if not self.rises:
            return math.nan, math.inf
        rises = torch.tensor(self.rises, dtype=torch.float64)
        stderr = float(rises.std()) / math.sqrt(len(rises)) if len(rises) > 1 else math.inf
        return float(rises.mean()), stderr

    def result(self, partial: str = "") -> PerturbationSharpnessResult:
        """All of it as a result, marked by ``partial`` if that says why it is not whole."""
        average, stderr = self.average()
        return PerturbationSharpnessResult(
            average=average,
            average_stderr=stderr,
            worst=self.worst,
            sam=self.sam,
            gradient_norm=self.gradient_norm,
            center_loss=self.center_loss,
            average_radius=self.average_radius,
            radius=self.radius,
            norm=self.norm,
            adaptive=self.adaptive,
            num_draws=len(self.rises),
            num_evaluations=self.num_evaluations,
            num_gradients=self.num_gradients,
            num_nonfinite=self.num_nonfinite,
            num_samples=self.num_samples,
            num_parameters=self.num_parameters,
            num_fixed=self.num_fixed,
            seed=self.seed,
            partial=partial,
        )
