"""Result of a loss landscape: its values, what follows from them, and its report."""

import math
import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.loss_landscape.figures import Scale, plot_line, plot_plane, surface_mesh, triangles
from moe_heads.analysis.loss_landscape.trajectory import Trajectory
from moe_heads.analysis.loss_landscape.validity import (
    CurvatureCheck,
    crossing_radius,
    largest_rise,
    second_difference,
)
from moe_heads.checks import check_option

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LossLandscapeResult", "Quantity"]

Quantity = Literal["losses", "losses_fixed_routing", "routing_flips", "accuracies"]
"""A field that can be drawn as a map."""

_LOSSES = ("losses", "losses_fixed_routing")
_LABELS: dict[Quantity, str] = {
    "losses": "mean loss",
    "losses_fixed_routing": "mean loss",
    "routing_flips": "fraction of samples",
    "accuracies": "accuracy",
}
_ARRAYS = ("alphas", "betas", "losses", "losses_fixed_routing", "accuracies", "routing_flips")

# A surface whose finite losses span more than this factor is drawn on a logarithmic scale.
_LOG_RATIO = 100.0

# Rises of the loss, as fractions of the center loss, whose distance is reported.
_RISES = (0.1, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class LossLandscapeResult:
    r"""Mean loss along a line (1-D) or on a plane (2-D) of the parameters. All tensors are float64 on the CPU.

    Attributes:
        alphas: Coordinates along the first direction, (A,).
        betas: Coordinates along the second direction, (B,), or None in 1-D.
        losses: Mean loss over the samples, (A,) or (A, B). Values may be nan or inf.
        accuracies: Mean of ``accuracy_fn``, same shape, or None without one.
        routing_flips: Fraction of samples (0 to 1) whose set of chosen experts differs from that at the center, same
            shape, as the mean over the heads. For a soft router the choice is its largest gate. None if no router ran.
        center_loss: Loss at the center, measured separately.
        center_accuracy: Accuracy at the center, or None without ``accuracy_fn``.
        num_samples: Number of samples.
        seed: Seed of the random number generators at every point.
        num_unmeasured: Number of points that were not measured, nan in every tensor. Zero unless the result is partial.
        partial: Reason why the analysis ended early, or "".
        losses_fixed_routing: Mean loss with the choices of the center, same shape as ``losses``: what remains of the
            difference between dense and sparse heads if no sample changes its experts. None without a sparse head, or
            if it was not requested.
        checks: For each flat direction the curvature of the slice and that of the Hessian, if requested.
        direction_norms: Length of each direction in units of the parameters.
        reused: Modules that were evaluated once for all points, since nothing moves in or before them.
        not_reused: Reason why they were not, although there are modules before the moved parameters, or "".
        not_shared: Reason why accuracy or the loss at fixed routing took separate passes, or "".
        trajectory: Training run on this plane, or None.
        is_soft: Whether all routers that ran are soft. Their loss does not jump at a flip.
    """

    alphas: Tensor
    betas: Tensor | None
    losses: Tensor
    accuracies: Tensor | None
    routing_flips: Tensor | None
    center_loss: float
    center_accuracy: float | None
    num_samples: int
    seed: int
    num_unmeasured: int = 0
    partial: str = ""
    losses_fixed_routing: Tensor | None = None
    checks: tuple[CurvatureCheck, ...] = ()
    direction_norms: tuple[float, ...] = ()
    reused: tuple[str, ...] = ()
    not_reused: str = ""
    not_shared: str = ""
    trajectory: Trajectory | None = None
    is_soft: bool = False

    @property
    def flip(self) -> str:
        """Description of a routing flip."""
        return "another largest gate" if self.is_soft else "other experts chosen"

    @property
    def axes(self) -> tuple[Tensor, ...]:
        """Coordinates along each direction."""
        return (self.alphas,) if self.betas is None else (self.alphas, self.betas)

    @property
    def num_nonfinite(self) -> int:
        """Number of measured points whose loss is nan or inf."""
        return int((~self.losses.isfinite()).sum()) - self.num_unmeasured

    @property
    def num_nan(self) -> int:
        """Number of measured points whose loss is nan."""
        return int(self.losses.isnan().sum()) - self.num_unmeasured

    @property
    def scale(self) -> Scale:
        """Scale of the loss in figures and mesh: log if positive losses span a factor of more than 100."""
        finite = self.losses[self.losses.isfinite()]
        wide = len(finite) > 0 and bool(finite.min() > 0) and bool(finite.max() > _LOG_RATIO * finite.min())
        return "log" if wide else "linear"

    @property
    def curvatures(self) -> tuple[float, ...]:
        r"""Second difference :math:`(L(h) - 2 L(0) + L(-h)) / h^2` along each direction, with the grid spacing h.

        Along a unit eigenvector it estimates the eigenvalue, with an error of order h². It is () unless both grids have
        zero between two neighbors at equal distance, and nan or inf where a loss is.
        """
        curvatures = []
        for dim, axis in enumerate(self.axes):
            line = self.losses
            for other in reversed(range(len(self.axes))):
                if other != dim and not bool((self.axes[other] == 0).any()):
                    return ()
                line = line if other == dim else line.select(other, int((self.axes[other] == 0).nonzero()))
            found = second_difference(axis, line)
            if found is None:
                return ()
            curvatures.append(found)
        return tuple(curvatures)

    @property
    def reach(self) -> float:
        """Distance from the center that the grid covers in every direction, or 0 if the grid is on one side of it."""
        return max(0.0, min(min(-float(axis[0]), float(axis[-1])) for axis in self.axes))

    @property
    def routing_gap(self) -> Tensor | None:
        """Loss at free routing minus loss at fixed routing, or None without a sparse head."""
        return None if self.losses_fixed_routing is None else self.losses - self.losses_fixed_routing

    def radius(self, rise: float, *, relative: bool = True) -> float:
        """Return the smallest distance, in units of the coordinates, at which the loss has risen by an amount.

        The loss is interpolated along the lines of the grid. A loss that is not finite counts as risen.

        Args:
            rise: The amount.
            relative: Whether the amount is a fraction of the center loss. Otherwise it is in units of the loss.

        Returns:
            The distance, or inf if the loss does not rise that far on the grid.
        """
        level = self.center_loss + rise * (abs(self.center_loss) if relative else 1.0)
        # points that were not measured do not count as risen
        losses = self.losses if not self.num_unmeasured else self.losses.nan_to_num(-math.inf, posinf=math.inf)
        return crossing_radius(self.axes, losses, level, self.center_loss)

    def rise_within(self, radius: float) -> float:
        """Return the sharpness of the basin: the largest rise of the loss at the points within a distance.

        Returns:
            The rise, at least 0. It is inf if a loss is not finite, and nan if no point is that close or one of them
            was not measured.
        """
        rise = largest_rise(self.axes, self.losses, self.center_loss, radius)
        return math.nan if self.num_unmeasured and math.isinf(rise) else rise

    def metrics(self) -> dict[str, float]:
        """Return the finite values to log: losses, curvatures, radii, flips. Others have no key."""
        values = {"center_loss": self.center_loss, "num_nonfinite": float(self.num_nonfinite)}
        finite = self.losses[self.losses.isfinite()]
        if len(finite):
            values |= {"loss_min": float(finite.min()), "loss_mean": float(finite.mean())}
            values["loss_max"] = float(finite.max())
        values |= {f"curvature_{rank}": value for rank, value in enumerate(self.curvatures, start=1)}
        for check in self.checks:
            values[f"curvature_{check.direction}_exact"] = check.exact
            values[f"curvature_{check.direction}_slice"] = check.second_difference
            values[f"curvature_{check.direction}_agrees"] = float(check.agrees)
        values |= {f"radius_{rise:.0%}".removesuffix("%"): self.radius(rise) for rise in _RISES}
        values["rise_half_reach"] = self.rise_within(self.reach / 2)
        if self.center_accuracy is not None and self.accuracies is not None:
            values["center_accuracy"] = self.center_accuracy
            accuracies = self.accuracies[~self.accuracies.isnan()]
            values |= {"accuracy_min": float(accuracies.min())} if len(accuracies) else {}
        values |= self._routing_metrics()
        values["num_samples"] = float(self.num_samples)
        if self.partial:
            values["partial"] = 1.0
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def summary(self) -> str:
        """Return a Markdown table of the values, with notes."""
        rows = [(name.replace("_", " "), f"{value:.5g}") for name, value in self.metrics().items()]
        return "\n".join([markdown_table(("quantity", "value"), rows), *(f"\n{note}" for note in _notes(self))])

    @property
    def maps(self) -> tuple[Quantity, ...]:
        """Quantities of a plane that have something to show, the loss first, or () for a line."""
        if self.betas is None:
            return ()
        flips, fixed = self.routing_flips, self.losses_fixed_routing
        has_flips = flips is not None and bool((flips > 0).any())
        shown: dict[Quantity, bool] = {
            "losses": True,
            "losses_fixed_routing": fixed is not None and has_flips,
            "routing_flips": has_flips,
            "accuracies": self.accuracies is not None,
        }
        return tuple(quantity for quantity, is_shown in shown.items() if is_shown)

    def plot(self, ax: "Axes | None" = None, quantity: Quantity = "losses") -> "tuple[Figure, Axes]":
        """Plot the curves of a line, or a quantity of a plane as a map with contour lines.

        Args:
            ax: Axes to draw into. By default new axes in a figure that pyplot does not manage.
            quantity: Quantity of the map, one of ``maps``. The loss at fixed routing has the colors of the loss.

        Raises:
            ValueError: If it was not measured, or the landscape is a line.
        """
        check_option("quantity", quantity, self.maps or ("losses",))
        title = self._title(quantity)
        if self.betas is not None:
            is_loss = quantity in _LOSSES
            return plot_plane(
                self.alphas.numpy(),
                self.betas.numpy(),
                getattr(self, quantity).numpy(),
                quantity=_LABELS[quantity],
                limits=self._loss_limits if is_loss else (0.0, 1.0) if quantity == "routing_flips" else None,
                scale=self.scale if is_loss else "linear",
                title=title,
                trajectory=self.trajectory,
                ax=ax,
            )
        fixed, flips = (None if v is None else v.numpy() for v in (self.losses_fixed_routing, self.routing_flips))
        return plot_line(
            self.alphas.numpy(),
            self.losses.numpy(),
            center_loss=self.center_loss,
            fixed=fixed,
            routing_flips=flips,
            flip=self.flip,
            scale=self.scale,
            title=title,
            ax=ax,
        )

    @property
    def has_surface(self) -> bool:
        """True if it is a plane with at least one triangle of finite points, which `mesh` needs."""
        return self.betas is not None and len(triangles(self.losses.isfinite())) > 0

    def mesh(self, tilt: float = 50.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return the surface of a plane as vertices, faces and colors for ``SummaryWriter.add_mesh``.

        Args:
            tilt: Degrees by which the surface is tipped backwards. TensorBoard's camera views it from above otherwise.

        Raises:
            ValueError: For a line.
        """
        if self.betas is None:
            raise ValueError("mesh: expected a landscape on a plane, got one along a line. Pass direction2.")
        return surface_mesh(self.alphas, self.betas, self.losses, scale=self.scale, tilt=tilt)

    def save(self, file: "str | os.PathLike[str] | IO[bytes]") -> None:
        """Write an ``.npz`` with the tensors that exist, ``center_loss``, and every metric as ``metric_…``.

        With a trajectory it also has ``trajectory_coordinates`` (T, 2), ``trajectory_residuals`` (T,) and
        ``explained_variance``.

        Args:
            file: Path or open file.
        """
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {"center_loss": self.center_loss, "direction_norms": self.direction_norms or None}
        if self.trajectory is not None:
            arrays["trajectory_coordinates"] = self.trajectory.coordinates
            arrays["trajectory_residuals"] = self.trajectory.residuals
            arrays["explained_variance"] = self.trajectory.explained_variance
        arrays |= {f"metric_{name}": value for name, value in self.metrics().items()}
        existing: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items() if value is not None}
        np.savez(file, **existing)

    def _routing_metrics(self) -> dict[str, float]:
        values: dict[str, float] = {}
        if self.routing_flips is not None:
            flips = self.routing_flips[~self.routing_flips.isnan()]
            values |= {"flips_mean": float(flips.mean()), "flips_max": float(flips.max())} if len(flips) else {}
        if self.losses_fixed_routing is not None and self.routing_gap is not None:
            fixed = self.losses_fixed_routing[self.losses_fixed_routing.isfinite()]
            gaps = self.routing_gap[self.routing_gap.isfinite()]
            if len(fixed) and len(gaps):
                values |= {"loss_max_fixed_routing": float(fixed.max()), "loss_mean_fixed_routing": float(fixed.mean())}
                values |= {"routing_gap_mean": float(gaps.mean()), "routing_gap_max": float(gaps.abs().max())}
        return values

    @property
    def _loss_limits(self) -> tuple[float, float] | None:
        """Smallest and largest loss at free and fixed routing, so that a color is the same loss in both maps."""
        losses = [values for name in _LOSSES if (values := getattr(self, name)) is not None]
        finite = torch.cat([values[values.isfinite()] for values in losses])
        if self.scale == "log":
            finite = finite[finite > 0]
        return (float(finite.min()), float(finite.max())) if len(finite) else None

    def _title(self, quantity: Quantity) -> str:
        missing = f", {self.num_nonfinite} points not finite" if self.num_nonfinite else ""
        missing += f", {self.num_unmeasured} points not measured" if self.num_unmeasured else ""
        what = {
            "losses": f"loss {self.center_loss:.4g} at the center",
            "losses_fixed_routing": f"loss at fixed routing, {self.center_loss:.4g} at the center",
            "routing_flips": f"{self.flip} than at the center",
            "accuracies": f"accuracy {self.center_accuracy or 0.0:.4g} at the center",
        }
        return f"{what[quantity]} ({self.num_samples} samples{missing})"


def _notes(result: LossLandscapeResult) -> list[str]:
    grid = " × ".join(str(size) for size in result.losses.shape)
    notes = [f"{grid} points. Losses are drawn on a {result.scale} scale. Distances are in units of the coordinates."]
    if result.partial:
        notes.append(f"**Partial**: {result.partial}. {result.num_unmeasured} points are missing.")
    if result.num_nonfinite:
        notes.append(
            f"{result.num_nonfinite} points have a loss of nan or inf ({result.num_nan} nan). They are left blank."
        )
    beyond = [f"{rise:.0%}" for rise in _RISES if math.isinf(result.radius(rise))]
    if beyond:
        notes.append(f"The loss does not rise by {', '.join(beyond)} on the grid.")
    notes.extend(map(_check_note, result.checks))
    if result.routing_flips is not None and bool(result.routing_flips.any()):
        notes.append(
            "For some samples another expert has the largest gate than at the center. The loss of a soft head, which"
            " mixes all experts, does not jump there."
            if result.is_soft
            else "Some samples are routed to different experts than at the center. The loss of a sparse head jumps"
            " there."
        )
    if result.reused:
        notes.append(f"Evaluated once for all points: {', '.join(result.reused)}.")
    if result.not_reused:
        notes.append(f"No module was evaluated once for all points: {result.not_reused}.")
    if result.not_shared:
        notes.append(f"Separate passes: {result.not_shared}.")
    if result.trajectory is not None:
        notes.append(result.trajectory.summary())
    return notes


def _check_note(check: CurvatureCheck) -> str:
    kinks = "**they do not agree**, since the slice has kinks (of ReLU) or jumps that the Hessian does not include"
    return (
        f"Curvature along direction {check.direction}: {check.exact:.5g} by the Hessian, {check.second_difference:.5g}"
        f" by the slice at ±{check.step:.3g} (truncation {check.truncation:.1g}, rounding {check.rounding:.1g}):"
        f" {'they agree' if check.agrees else kinks}."
    )
