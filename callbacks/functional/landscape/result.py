"""What a loss landscape analysis found, and how it is reported."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_heads.callbacks.functional.landscape.figure import Scale, plot_line, plot_plane
from moe_heads.callbacks.functional.landscape.mesh import surface_mesh, triangles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LossLandscapeResult"]

# A surface whose finite losses span more than this factor is shown on a logarithmic scale.
_LOG_RATIO = 100.0


@dataclass(frozen=True, eq=False)
class LossLandscapeResult:
    r"""Mean loss along a line (1-D) or on a plane (2-D) of the parameters; all tensors float64 on the CPU.

    Attributes:
        alphas: Coordinates along the first direction, (A,).
        betas: Coordinates along the second direction, (B,); None in 1-D.
        losses: Mean loss over the samples, (A,) or (A, B); nan and inf as the model gave them.
        accuracies: Mean of ``accuracy_fn``, same shape; None when not asked for.
        routing_flips: Share of the samples (0 to 1) whose set of chosen experts is not that at the centre, same shape;
            the mean over the heads. A soft router chooses its largest gate. None when no router ran.
        center_loss: Loss of the model as it is, measured by itself.
        center_accuracy: Accuracy of the model as it is; None when not asked for.
        num_samples: Samples of the loss.
        seed: Seed of the random number generators at every point.
        num_unmeasured: Points that the analysis did not come to; nan in every tensor. Zero unless it is partial.
        partial: Why the analysis ended before its time; "" for one that is whole.
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

    @property
    def num_nonfinite(self) -> int:
        """Points whose loss was measured and is nan or inf."""
        return int((~self.losses.isfinite()).sum()) - self.num_unmeasured

    @property
    def scale(self) -> Scale:
        """Scale of the loss in figures and mesh: log when positive losses span a factor of more than 100."""
        finite = self.losses[self.losses.isfinite()]
        wide = len(finite) > 0 and bool(finite.min() > 0) and bool(finite.max() > _LOG_RATIO * finite.min())
        return "log" if wide else "linear"

    @property
    def curvatures(self) -> tuple[float, ...]:
        r"""Second difference :math:`(L(h) - 2 L(0) + L(-h)) / h^2` along each direction, h the distance of the points.

        Along a unit eigenvector it estimates the eigenvalue, with an error of order h². Empty unless both grids hold
        zero between two neighbours at equal distance; nan or inf where a loss is.
        """
        axes = [self.alphas] if self.betas is None else [self.alphas, self.betas]
        zeros = [_inner_zero(axis) for axis in axes]
        if any(zero is None for zero in zeros):
            return ()
        curvatures = []
        for dim, (axis, zero) in enumerate(zip(axes, zeros, strict=True)):
            line = self.losses
            for other in reversed(range(len(axes))):
                line = line if other == dim else line.select(other, zeros[other] or 0)
            assert zero is not None
            before, at, after = line[zero - 1 : zero + 2].tolist()
            curvatures.append((before - 2 * at + after) / float(axis[zero + 1]) ** 2)
        return tuple(curvatures)

    def metrics(self) -> dict[str, float]:
        """The finite numbers to log: center_loss, loss_min, loss_max, curvature_1, flips_max, counts, ..."""
        finite = self.losses[self.losses.isfinite()]
        values = {"center_loss": self.center_loss, "num_nonfinite": float(self.num_nonfinite)}
        if len(finite):
            values |= {"loss_min": float(finite.min()), "loss_mean": float(finite.mean())}
            values["loss_max"] = float(finite.max())
        values |= {f"curvature_{rank}": value for rank, value in enumerate(self.curvatures, start=1)}
        if self.center_accuracy is not None and self.accuracies is not None:
            values["center_accuracy"] = self.center_accuracy
            values["accuracy_min"] = float(self.accuracies.nan_to_num(1.0).min())
        if self.routing_flips is not None:
            flips = self.routing_flips[~self.routing_flips.isnan()]
            values |= {"flips_mean": float(flips.mean()), "flips_max": float(flips.max())} if len(flips) else {}
        values["num_samples"] = float(self.num_samples)
        if self.partial:
            values["partial"] = 1.0
        return {key: value for key, value in values.items() if abs(value) < float("inf")}

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Curve of the loss (1-D, with the routing flips on a second axis) or map with contour lines (2-D).

        Args:
            ax: Axes to draw into; by default those of a new figure that pyplot does not know.
        """
        lost = f", {self.num_nonfinite} points not finite" if self.num_nonfinite else ""
        lost += f", {self.num_unmeasured} points not measured" if self.num_unmeasured else ""
        title = f"loss {self.center_loss:.4g} at the centre ({self.num_samples} samples{lost})"
        alphas, losses = self.alphas.numpy(), self.losses.numpy()
        if self.betas is not None:
            return plot_plane(alphas, self.betas.numpy(), losses, scale=self.scale, title=title, ax=ax)
        flips = None if self.routing_flips is None else self.routing_flips.numpy()
        return plot_line(
            alphas, losses, center_loss=self.center_loss, routing_flips=flips, scale=self.scale, title=title, ax=ax
        )

    @property
    def has_surface(self) -> bool:
        """Whether there is a plane with at least one triangle of finite points: what `mesh` needs."""
        return self.betas is not None and len(triangles(self.losses.isfinite())) > 0

    def mesh(self, tilt: float = 50.0) -> tuple[Tensor, Tensor, Tensor]:
        """The surface of a plane as vertices, faces and colours for ``SummaryWriter.add_mesh``; see `surface_mesh`.

        Args:
            tilt: Degrees by which the surface is tipped backwards: TensorBoard's camera would see it from above.

        Raises:
            ValueError: For a line.
        """
        if self.betas is None:
            raise ValueError("mesh: expected a landscape on a plane (direction2); got one along a line")
        return surface_mesh(self.alphas, self.betas, self.losses, scale=self.scale, tilt=tilt)

    def summary(self) -> str:
        """Markdown table of the numbers, and a sentence on what the reader has to know."""
        grid = " × ".join(str(size) for size in self.losses.shape)
        rows = [f"| {name.replace('_', ' ')} | {value:.5g} |" for name, value in self.metrics().items()]
        notes = [f"\n{grid} points; losses are drawn on a {self.scale} scale."]
        if self.partial:
            notes.append(f"\n**Partial**: {self.partial}; {self.num_unmeasured} points are missing.")
        if self.num_nonfinite:
            notes.append(f"\n{self.num_nonfinite} points have a loss that is nan or inf; they are left blank.")
        if self.routing_flips is not None and bool(self.routing_flips.any()):
            notes.append("\nSome samples choose other experts than at the centre: a sparse head's loss jumps there.")
        return "\n".join(["| quantity | value |", "|---|---|", *rows, *notes])


def _inner_zero(axis: Tensor) -> int | None:
    """Index of zero, when it lies between two neighbours at equal distance."""
    found = (axis == 0).nonzero().flatten().tolist()
    if not found or not 0 < found[0] < len(axis) - 1:
        return None
    zero = int(found[0])
    return zero if torch.isclose(axis[zero - 1], -axis[zero + 1], rtol=1e-6) else None
