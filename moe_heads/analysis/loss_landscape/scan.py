"""Scan of a landscape: the order of its points, the points measured so far, and the result at any moment."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.loss_landscape.evaluate import Point, PointEvaluator
from moe_heads.analysis.loss_landscape.grid import widest_gap
from moe_heads.analysis.loss_landscape.points_file import Place, PointCheckpoint
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult
from moe_heads.analysis.loss_landscape.trajectory import Trajectory
from moe_heads.analysis.loss_landscape.validity import CurvatureCheck, check_curvature

__all__ = ["Scan"]

# Points that the check of the curvature along one direction takes.
_POINTS_PER_CHECK = 4

# Different hardware or numbers of threads change a loss by rounding only.
_CENTER_TOLERANCE = 1e-5


class Scan:
    """One landscape, measured from its center to its last point, on rank zero.

    Args:
        axes: Coordinates along each direction.
        total: Measures the sums at a point over the samples of all ranks, see `PointEvaluator.evaluate`.
        evaluator: The evaluator of this rank.
        norms: Length of each direction.
        has_accuracy: Whether accuracies are measured.
        seed: Seed of every point.
        progress: Shows each point.
        checkpoint: File of points to continue from, or None.
        trajectory: Training run to draw on the plane, or None.
    """

    def __init__(
        self,
        axes: Sequence[Tensor],
        total: Callable[[Tensor], Tensor],
        evaluator: PointEvaluator,
        norms: tuple[float, ...],
        *,
        has_accuracy: bool,
        seed: int,
        progress: Progress,
        checkpoint: PointCheckpoint | None = None,
        trajectory: Trajectory | None = None,
    ) -> None:
        self._axes, self._total, self._evaluator, self._norms = [*axes], total, evaluator, norms
        self._has_accuracy, self._seed, self._trajectory = has_accuracy, seed, trajectory
        self._progress, self._checkpoint = progress, checkpoint
        self._origin: Place = (0.0,) * len(axes)
        self._points: dict[Place, Point] = {}
        self._checks: list[CurvatureCheck] = []
        self._num_done = self._num_to_come = 0

    def run(self, exact: Mapping[int, float], refine: int) -> LossLandscapeResult:
        """Measure all points, or as many as the time allows.

        Args:
            exact: Curvature to compare with along a direction, by the number of its axis.
            refine: Number of points to add to a line.

        Raises:
            ValueError: If the loss or accuracy at the center differs from that in the file.
        """
        try:
            self._start(num_extra=refine + _POINTS_PER_CHECK * len(exact))
            self._visit_ends(again=self._evaluator.cache.is_on)
            for dim, curvature in exact.items():
                self._check_curvature(dim, curvature)
            self._visit_grid()
            self._refine(refine)
        except TimeUp as error:
            in_time: LossLandscapeResult = self._progress.result_in_time(error)
            return in_time
        finally:
            if self._checkpoint is not None and self._points:
                self._checkpoint.write(self._points, now=True)
        return self.result()

    def result(self, partial: str = "") -> LossLandscapeResult:
        """Return the result of the points measured so far.

        Args:
            partial: Reason why the scan ended early, or "".
        """
        missing = Point(math.nan, math.nan, math.nan, math.nan, 0)
        rows = [self._points.get(place, missing).values for place in self._places()]
        columns = torch.tensor(rows, dtype=torch.float64).T.reshape(4, *map(len, self._axes))
        losses, fixed, accuracies, flips = columns
        center, cache = self._points[self._origin], self._evaluator.cache
        return LossLandscapeResult(
            alphas=self._axes[0],
            betas=self._axes[1] if len(self._axes) > 1 else None,
            losses=losses,
            accuracies=accuracies if self._has_accuracy else None,
            routing_flips=flips if not math.isnan(center.flips) else None,
            center_loss=center.loss,
            center_accuracy=center.accuracy if self._has_accuracy else None,
            num_samples=center.num_samples,
            seed=self._seed,
            num_unmeasured=self._num_missing,
            partial=partial,
            losses_fixed_routing=fixed if not math.isnan(center.fixed) else None,
            checks=tuple(self._checks),
            direction_norms=self._norms,
            reused=cache.reused,
            not_reused=cache.not_reused,
            not_shared=cache.not_shared,
            trajectory=self._trajectory,
            is_soft=self._evaluator.is_soft,
        )

    @property
    def _num_missing(self) -> int:
        return sum(place not in self._points for place in self._places())

    def _places(self) -> list[Place]:
        places = torch.cartesian_prod(*self._axes).reshape(-1, len(self._axes))
        return [tuple(place) for place in places.tolist()]

    def _start(self, num_extra: int) -> None:
        """Measure the center, and take over the points in the file."""
        known = {} if self._checkpoint is None else self._checkpoint.load()
        center = Point.of(self._total(torch.tensor(self._origin, dtype=torch.float64)))
        before = known.get(self._origin, center)
        _check_same("loss_fn", before.loss, center.loss)
        _check_same("accuracy_fn", before.accuracy, center.accuracy)
        self._points = known | {self._origin: center}
        if self._checkpoint is not None:
            self._checkpoint.write(self._points, now=True)  # so that a different loss is detected from here on
        self._num_to_come = self._num_missing + num_extra
        self._progress.step(1, 1 + self._num_to_come)

    def _visit_ends(self, *, again: bool) -> None:
        """Measure the farthest point of the grid and the opposite one, where an error of reused outputs is largest.

        Args:
            again: Whether to measure them also if the file has them, as long as other points are missing.
        """
        if not self._num_missing:
            return
        far = max(self._places(), key=lambda place: math.hypot(*place))
        opposite = max(self._places(), key=lambda place: math.dist(place, far))
        for place in dict.fromkeys((far, opposite)):
            if any(place) and (again or place not in self._points):
                self._num_to_come += place in self._points
                self._points.pop(place, None)
                self._measure(place)

    def _visit_grid(self) -> None:
        # from the center outwards, so that a partial result is a disc and its ends, not a few rows
        for place in sorted(self._places(), key=lambda place: math.hypot(*place)):
            if place not in self._points:
                self._measure(place)

    def _refine(self, num_points: int) -> None:
        """Add points to a line where linear interpolation misses the loss the most."""
        for _ in range(num_points):
            losses = torch.tensor([self._points[place].loss for place in self._places()], dtype=torch.float64)
            alpha = widest_gap(self._axes[0], losses)
            if alpha is None:
                return
            self._measure((alpha,))
            self._axes[0] = torch.cat([self._axes[0], self._axes[0].new_tensor([alpha])]).sort().values

    def _check_curvature(self, dim: int, exact: float) -> None:
        axis = self._axes[dim]
        spacing = float(axis[axis != 0].abs().min())

        def loss_at(distance: float) -> float:
            return _smooth_loss(self._measure(tuple(distance if d == dim else 0.0 for d in range(len(self._axes)))))

        epsilon = torch.finfo(self._evaluator.dtype).eps
        check = check_curvature(loss_at, _smooth_loss(self._points[self._origin]), exact, spacing, epsilon)
        self._checks.append(replace(check, direction=dim + 1))

    def _measure(self, place: Place) -> Point:
        if place not in self._points:
            self._points[place] = Point.of(self._total(torch.tensor(place, dtype=torch.float64)))
            self._progress.keep(self.result)
            if self._checkpoint is not None:
                self._checkpoint.write(self._points)
        self._num_done += 1
        # a point of a check may be on the grid, so the number of points to come is an upper bound
        self._progress.step(1 + self._num_done, 1 + max(self._num_to_come, self._num_done))
        return self._points[place]


def _smooth_loss(point: Point) -> float:
    """Return the loss whose second derivative the Hessian is: at fixed routing, if there is one."""
    return point.loss if math.isnan(point.fixed) else point.fixed


def _check_same(name: str, before: float, now: float) -> None:
    is_same = math.isclose(before, now, rel_tol=_CENTER_TOLERANCE) or (math.isnan(before) and math.isnan(now))
    if not is_same:
        raise ValueError(
            f"resume: expected the same {name}, {now} at the center, got {before} in the file. Pass another file or"
            " delete it."
        )
