"""The numbers of a landscape as they are logged and read."""

import math

from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.loss_landscape.measured import MeasuredLandscape
from moe_heads.analysis.loss_landscape.validity import CurvatureCheck

__all__ = ["landscape_metrics", "landscape_summary"]

_KINKS = "**they do not agree**, the slice has kinks (of ReLU) or jumps, which the Hessian does not see"

_SPARSE_FLIPS = "Some samples choose other experts than at the center: a sparse head's loss jumps there."
_SOFT_FLIPS = (
    "For some samples another expert has the largest gate than at the center; the loss of a soft head, which mixes all"
    " of them, does not jump there."
)

# Rises of the loss, as parts of that at the center, whose distance is told.
_RISES = (0.1, 0.5, 1.0)


def landscape_metrics(result: MeasuredLandscape) -> dict[str, float]:
    """The finite numbers: what is not finite, or does not exist, has no key."""
    values = {"center_loss": result.center_loss, "num_nonfinite": float(result.num_nonfinite)}
    finite = result.losses[result.losses.isfinite()]
    if len(finite):
        values |= {"loss_min": float(finite.min()), "loss_mean": float(finite.mean())}
        values["loss_max"] = float(finite.max())
    values |= {f"curvature_{rank}": value for rank, value in enumerate(result.curvatures, start=1)}
    for check in result.checks:
        values[f"curvature_{check.direction}_exact"] = check.exact
        values[f"curvature_{check.direction}_slice"] = check.second_difference
        values[f"curvature_{check.direction}_agrees"] = float(check.agrees)
    values |= {f"radius_{rise:.0%}".removesuffix("%"): result.radius(rise) for rise in _RISES}
    values["rise_half_reach"] = result.rise_within(result.reach / 2)
    if result.center_accuracy is not None and result.accuracies is not None:
        values["center_accuracy"] = result.center_accuracy
        accuracies = result.accuracies[~result.accuracies.isnan()]
        values |= {"accuracy_min": float(accuracies.min())} if len(accuracies) else {}
    values |= _routing_numbers(result)
    values["num_samples"] = float(result.num_samples)
    if result.partial:
        values["partial"] = 1.0
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _routing_numbers(result: MeasuredLandscape) -> dict[str, float]:
    values: dict[str, float] = {}
    if result.routing_flips is not None:
        flips = result.routing_flips[~result.routing_flips.isnan()]
        values |= {"flips_mean": float(flips.mean()), "flips_max": float(flips.max())} if len(flips) else {}
    if result.losses_fixed_routing is not None and result.routing_gap is not None:
        fixed = result.losses_fixed_routing[result.losses_fixed_routing.isfinite()]
        gaps = result.routing_gap[result.routing_gap.isfinite()]
        if len(fixed) and len(gaps):
            values |= {"loss_max_fixed_routing": float(fixed.max()), "loss_mean_fixed_routing": float(fixed.mean())}
            values |= {"routing_gap_mean": float(gaps.mean()), "routing_gap_max": float(gaps.abs().max())}
    return values


def landscape_summary(result: MeasuredLandscape) -> str:
    """Markdown: the table of the numbers, and a sentence on each thing that the reader has to know."""
    rows = [(name.replace("_", " "), f"{value:.5g}") for name, value in landscape_metrics(result).items()]
    return "\n".join([markdown_table(("quantity", "value"), rows), *(f"\n{note}" for note in _notes(result))])


def _notes(result: MeasuredLandscape) -> list[str]:
    grid = " × ".join(str(size) for size in result.losses.shape)
    notes = [f"{grid} points; losses are drawn on a {result.scale} scale. Distances are in units of the coordinates."]
    if result.partial:
        notes.append(f"**Partial**: {result.partial}; {result.num_unmeasured} points are missing.")
    if result.num_nonfinite:
        notes.append(
            f"{result.num_nonfinite} points have a loss that is nan or inf ({result.num_nan} nan); they are left blank."
        )
    beyond = [f"{rise:.0%}" for rise in _RISES if math.isinf(result.radius(rise))]
    if beyond:
        notes.append(f"A rise of the loss by {', '.join(beyond)} is not within reach.")
    notes.extend(map(_told, result.checks))
    if result.routing_flips is not None and bool(result.routing_flips.any()):
        notes.append(_SOFT_FLIPS if result.is_soft else _SPARSE_FLIPS)
    if result.reused:
        notes.append(f"Computed once for all points: {', '.join(result.reused)}.")
    if result.not_reused:
        notes.append(f"Nothing was computed once: {result.not_reused}.")
    if result.not_shared:
        notes.append(f"Passes of their own: {result.not_shared}.")
    if result.trajectory is not None:
        notes.append(result.trajectory.summary())
    return notes


def _told(check: CurvatureCheck) -> str:
    return (
        f"Curvature along direction {check.direction}: {check.exact:.5g} by the Hessian, {check.second_difference:.5g}"
        f" by the slice at ±{check.step:.3g} (truncation {check.truncation:.1g}, rounding {check.rounding:.1g}):"
        f" {'they agree' if check.agrees else _KINKS}."
    )
