"""Worst case: the step of sharpness-aware minimization, and projected steepest ascent from there."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis._shared.progress import TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.sharpness.perturbation.findings import Findings
from moe_heads.analysis.sharpness.perturbation.losses import PerturbedLosses
from moe_heads.analysis.sharpness.perturbation.result import Norm, PerturbationSharpnessResult
from moe_heads.analysis.sharpness.perturbation.weights import PerturbedWeights

__all__ = ["worst_case"]

# Steps of the ascent in units of the radius. Twice the radius crosses the ball; longer ones found no more.
_LARGEST_STEP, _SMALLEST_STEP = 2.0, 2.0**-10


@dataclass
class _Point:
    """Mean loss at u, with the steepest direction there (None where there is none) and its slope."""

    u: Tensor
    loss: float
    direction: Tensor | None
    slope: float


def worst_case(
    ranks: Ranks, losses: PerturbedLosses, weights: PerturbedWeights, findings: Findings
) -> PerturbationSharpnessResult:
    """Fill in the SAM step and the ascent from there."""
    size, radius, norm = findings.num_parameters, findings.radius, findings.norm

    def algorithm(total: Callable[[Tensor], Tensor]) -> PerturbationSharpnessResult:
        def measure(u: Tensor) -> _Point:
            sums = total(u.double())
            findings.num_gradients += 1
            loss = float(sums[-2] / sums[-1])
            findings.num_nonfinite += not math.isfinite(loss)
            direction, slope = _steepest(sums[:-2] / sums[-1], norm)
            return _Point(u, loss, None if direction is None else direction.to(weights.dtype), slope)

        try:
            center = measure(torch.zeros(size, dtype=weights.dtype, device=weights.device))
            findings.gradient_norm = center.slope
            findings.step()
            first = center.direction
            if first is None:
                first, _ = _steepest(weights.random_start(findings.seed), norm)
            # all zeros in the model: nothing can move
            point = center if first is None else measure(radius * first)
            findings.sam = point.loss - center.loss

            def found(point: _Point) -> None:
                rise = point.loss - center.loss
                # max() would lose a nan
                findings.worst = rise if math.isnan(rise) else max(rise, 0.0)
                findings.step()

            found(point)
            _ascend(point, measure, radius, norm, findings.num_steps, found)
        except TimeUp as error:
            in_time: PerturbationSharpnessResult = findings.progress.result_in_time(error)
            return in_time
        return findings.result()

    # only their shape counts: views of one number
    one = torch.zeros(1, dtype=torch.float64, device=weights.device)
    return ranks.run_with_sums(losses.at_point, algorithm, one.expand(size), one.expand(size + 2))


def _ascend(
    best: _Point,
    measure: Callable[[Tensor], _Point],
    radius: float,
    norm: Norm,
    num_steps: int,
    found: Callable[[_Point], None],
) -> None:
    """Projected steepest ascent in the ball; each point is at least as good as the one before it."""
    step = _LARGEST_STEP
    for _ in range(num_steps):
        # a loss that is not finite ends it: there is nothing larger, or no way on
        if not math.isfinite(best.loss) or best.direction is None or step < _SMALLEST_STEP:
            return
        trial = measure(_projected(best.u + step * radius * best.direction, radius, norm))
        if trial.loss > best.loss or math.isnan(trial.loss):
            best, step = trial, min(2 * step, _LARGEST_STEP)
        else:
            step /= 2
        found(best)


def _steepest(gradient: Tensor, norm: Norm) -> tuple[Tensor | None, float]:
    """The u of unit norm along which the loss rises most, and its slope there; None where the gradient tells none."""
    slope = float(gradient.norm() if norm == "l2" else gradient.abs().sum())
    if slope == 0 or not math.isfinite(slope):
        return None, slope
    return (gradient / slope if norm == "l2" else gradient.sign()), slope


def _projected(u: Tensor, radius: float, norm: Norm) -> Tensor:
    """The nearest u in the ball."""
    if norm == "linf":
        return u.clamp(-radius, radius)
    length = float(u.norm())
    return u if length <= radius else u * (radius / length)
