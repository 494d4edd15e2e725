"""Critical sharpness of a loss along a line, with its error."""

import math
from collections.abc import Callable

from moe_heads.analysis.critical_sharpness.result import CriticalSharpnessResult
from moe_heads.analysis.critical_sharpness.search import Rise, first_rise

__all__ = ["critical_sharpness_along"]

# Roundings of a mean loss, in units of the resolution of its data type times its size.
_ROUNDINGS = 4

# Share of the critical step whose effect on a quadratic is 4 % of the largest decrease.
_NEGLIGIBLE = 0.01


def critical_sharpness_along(
    loss_at: Callable[[float], float],
    *,
    learning_rate: float,
    num_samples: int,
    resolution: Callable[[], float],
    is_coarse: bool = False,
    start: float = 1.0,
    tolerance: float = 0.05,
    max_passes: int = 12,
    smallest_step: float = 1e-3,
    largest_step: float = 1e5,
) -> CriticalSharpnessResult:
    """Return the critical sharpness of an update from the loss at multiples of it.

    Args:
        loss_at: Returns the loss at a multiple of the update.
        learning_rate: Learning rate of the update.
        num_samples: Number of samples in an evaluation.
        resolution: Returns the relative resolution of the losses, after the search.
        is_coarse: Whether the losses are computed in half precision. Then one more pass measures their rounding, by
            a step so small that it should not matter.
        start: First multiple.
        tolerance: See `critical_sharpness`.
        max_passes: See `critical_sharpness`.
        smallest_step: See `critical_sharpness`.
        largest_step: See `critical_sharpness`.

    Raises:
        ValueError: If the loss at 0 is not finite.
    """

    def checked(step: float) -> float:
        loss = loss_at(step)
        if step == 0 and not math.isfinite(loss):
            raise ValueError(f"loss_fn: expected a finite loss before the update, got {loss}.")
        return loss

    rise = first_rise(
        checked,
        start=start,
        tolerance=tolerance,
        smallest=smallest_step,
        largest=largest_step,
        max_losses=max_passes,
    )
    noise = _ROUNDINGS * resolution() * abs(rise.base)
    num_passes = len(rise.losses) + 1
    if is_coarse and rise.is_bracketed:
        noise = max(noise, 2 * abs(loss_at(_NEGLIGIBLE * rise.low) - rise.base))
        num_passes += 1
    reason = _reason(rise, noise, smallest_step, largest_step)
    critical = math.nan if reason else math.sqrt(rise.low * rise.high)
    steps = sorted(rise.losses)
    return CriticalSharpnessResult(
        lambda_c=2 / (critical * learning_rate),
        relative_error=math.inf if reason else _error(rise, noise),
        lower=2 / (rise.high * learning_rate),
        upper=2 / (rise.low * learning_rate) if rise.low else math.inf,
        critical_step=critical,
        learning_rate=learning_rate,
        loss=rise.base,
        steps=tuple(steps),
        losses=tuple(rise.losses[step] for step in steps),
        num_passes=num_passes,
        num_samples=num_samples,
        tolerance=tolerance,
        reason=reason,
    )


def _reason(rise: Rise, noise: float, smallest: float, largest: float) -> str:
    """Return the reason why the critical sharpness is unknown, or ""."""
    if all(loss == rise.base for loss in rise.losses.values()):
        return "the loss does not change along the update"
    if not rise.low:
        if all(abs(loss - rise.base) <= noise for loss in rise.losses.values()):
            return "the change of the loss is as small as its rounding"
        if not any(math.isfinite(loss) for loss in rise.losses.values()):
            return "the loss along the update is not finite: the step has diverged"
        at = f"{rise.high:.3g} times the update"
        if rise.high <= smallest:
            return f"the update is no descent direction: the loss rises already at {at}"
        return f"the loss rises already at {at}, the smallest step within {len(rise.losses) + 1} forward passes"
    if math.isinf(rise.high):
        return f"the loss does not rise up to {rise.low:.3g} times the update"
    if min(rise.losses.values()) >= rise.base - noise:
        return "the decrease of the loss along the update is as small as its rounding"
    return ""


def _error(rise: Rise, noise: float) -> float:
    """Return the relative distance of the middle of the bracket to its ends, widened by rounding."""
    half = math.sqrt(rise.high / rise.low) - 1
    difference = rise.losses[rise.high] - rise.losses[rise.low]
    # the ends move by the noise over the slope between them
    return half + (rise.width * noise / difference if difference else math.inf)
