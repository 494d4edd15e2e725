"""One landscape from its center to its last point, and the result at any moment on the way."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from moe_heads.analysis._shared.progress import TimeUp
from moe_heads.analysis.loss_landscape.point import Point
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult
from moe_heads.analysis.loss_landscape.scan import Scan
from moe_heads.analysis.loss_landscape.survey import Survey
from moe_heads.analysis.loss_landscape.trajectory import Trajectory
from moe_heads.analysis.loss_landscape.validity import CurvatureCheck, check_curvature

__all__ = ["POINTS_A_CHECK", "Exploration"]

POINTS_A_CHECK = 4
"""Points that a check of the curvature along one direction takes."""


@dataclass
class Exploration:
    """What is found of one landscape; rank zero's.

    Attributes:
        scan: Visits the points.
        survey: Measures them.
        norms: Length of each direction.
        has_accuracy: Whether accuracies are measured.
        seed: Seed of every point.
        trajectory: To be drawn on it.
        checks: Curvatures that were checked.
    """

    scan: Scan
    survey: Survey
    norms: tuple[float, ...]
    has_accuracy: bool
    seed: int
    trajectory: Trajectory | None = None
    checks: list[CurvatureCheck] = field(default_factory=list)

    def run(self, exact: Mapping[int, float], refine: int) -> LossLandscapeResult:
        """Measure everything, or what there is time for.

        Args:
            exact: Curvature along each direction that is to be checked, by the number of its axis.
            refine: Points to add to the grid.
        """
        self.scan.build = self.result
        try:
            self.scan.start()
            self.scan.visit_ends(anew=self.survey.saves)
            for dim, value in exact.items():
                self._check(dim, value)
            self.scan.visit_grid()
            self.scan.refine(refine)
        except TimeUp as error:
            in_time: LossLandscapeResult = self.scan.progress.result_in_time(error)
            return in_time
        finally:
            self.scan.close()
        return self.result()

    def result(self, partial: str = "") -> LossLandscapeResult:
        """What there is so far."""
        scan, features = self.scan, self.survey.features
        losses, fixed, accuracies, flips = scan.columns()
        return LossLandscapeResult(
            alphas=scan.axes[0],
            betas=scan.axes[1] if len(scan.axes) > 1 else None,
            losses=losses,
            accuracies=accuracies if self.has_accuracy else None,
            routing_flips=flips if not math.isnan(scan.center.flips) else None,
            center_loss=scan.center.loss,
            center_accuracy=scan.center.accuracy if self.has_accuracy else None,
            num_samples=scan.center.num_samples,
            seed=self.seed,
            num_unmeasured=scan.num_missing,
            partial=partial,
            losses_fixed_routing=fixed if not math.isnan(scan.center.fixed) else None,
            checks=tuple(self.checks),
            direction_norms=self.norms,
            reused=features.names,
            not_reused=features.reason,
            not_shared=self.survey.not_shared,
            trajectory=self.trajectory,
            is_soft=self.survey.is_soft,
        )

    def _check(self, dim: int, exact: float) -> None:
        axis = self.scan.axes[dim]
        spacing = float(axis[axis != 0].abs().min())

        def loss_at(distance: float) -> float:
            place = tuple(distance if other == dim else 0.0 for other in range(len(self.scan.axes)))
            return _smooth(self.scan.measure(place))

        epsilon = torch.finfo(self.survey.dtype).eps
        check = check_curvature(loss_at, _smooth(self.scan.center), exact, spacing, epsilon)
        self.checks.append(replace(check, direction=dim + 1))


def _smooth(point: Point) -> float:
    """The loss whose second derivative the Hessian is: that at fixed routing, where there is one."""
    return point.loss if math.isnan(point.fixed) else point.fixed
