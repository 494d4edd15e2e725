"""Visit the points of a landscape from the center outwards, and keep what is found."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.loss_landscape.grid import widest_gap
from moe_heads.analysis.loss_landscape.point import Point
from moe_heads.analysis.loss_landscape.record import Place, Record

__all__ = ["Scan"]

# A loss on another machine, or with other threads, is the same up to rounding.
_SAME_CENTER = 1e-5


@dataclass
class Scan:
    """The points that are known of a landscape.

    Attributes:
        axes: Coordinates along each direction.
        total: Measures a point over the samples of all ranks; see `Survey.measure`.
        progress: Told of each point.
        record: The file to go on from; None for none.
        num_extra: Points that will come besides those of the grid.
        build: Makes a result of what was found, marked by the reason why it ends there.
        found: Points by place.
    """

    axes: list[Tensor]
    total: Callable[[Tensor], Tensor]
    progress: Progress
    record: Record | None = None
    num_extra: int = 0
    build: Callable[[str], Any] | None = None
    found: dict[Place, Point] = field(default_factory=dict)

    @property
    def center(self) -> Point:
        """The model as it is."""
        return self.found[self._origin]

    @property
    def num_missing(self) -> int:
        """Points of the grid that were not measured."""
        return sum(place not in self.found for place in self._places())

    def start(self) -> None:
        """Measure the center, and take over what the file holds.

        Raises:
            ValueError: If the loss is not finite, or loss or accuracy are not those in the file.
        """
        known = {} if self.record is None else self.record.load()
        center = Point.of(self.total(torch.tensor(self._origin, dtype=torch.float64)))
        if not math.isfinite(center.loss):
            raise ValueError(f"loss_fn: expected a finite loss of the model as it is, got {center.loss}")
        _check_same("loss_fn", known.get(self._origin, center).loss, center.loss)
        _check_same("accuracy_fn", known.get(self._origin, center).accuracy, center.accuracy)
        self.found = known | {self._origin: center}
        if self.record is not None:
            self.record.write(self.found, now=True)  # from here on another loss is noticed
        self._num_to_come = sum(place not in self.found for place in self._places()) + self.num_extra
        self._num_done = 0
        self.progress.step(1, 1 + self._num_to_come)

    def visit_ends(self, *, anew: bool) -> None:
        """Measure the farthest point of the grid and the one opposite, where what is computed once shows most.

        Args:
            anew: Whether also where a file holds them, as long as any other point is to come.
        """
        if not self.num_missing:
            return
        far = max(self._places(), key=lambda place: math.hypot(*place))
        opposite = max(self._places(), key=lambda place: math.dist(place, far))
        for place in dict.fromkeys((far, opposite)):
            if any(place) and (anew or place not in self.found):
                self._num_to_come += place in self.found
                self.found.pop(place, None)
                self.measure(place)

    def visit_grid(self) -> None:
        """Measure what is missing of the grid."""
        # from the center outwards: what is there when the time is over is a disc and its ends, not some rows
        for place in sorted(self._places(), key=lambda place: math.hypot(*place)):
            if place not in self.found:
                self.measure(place)

    def refine(self, num_points: int) -> None:
        """Add points to a line where a straight line between its neighbors misses the loss the most."""
        for _ in range(num_points):
            losses = torch.tensor([self.found[place].loss for place in self._places()], dtype=torch.float64)
            alpha = widest_gap(self.axes[0], losses)
            if alpha is None:
                return
            self.measure((alpha,))
            self.axes[0] = torch.cat([self.axes[0], self.axes[0].new_tensor([alpha])]).sort().values

    def measure(self, place: Place) -> Point:
        """The point at a place, which is measured unless it is known."""
        if place not in self.found:
            self.found[place] = Point.of(self.total(torch.tensor(place, dtype=torch.float64)))
            if self.build is not None:
                self.progress.keep(self.build)
            if self.record is not None:
                self.record.write(self.found)
        self._num_done += 1
        # what was announced may be known by now
        self.progress.step(1 + self._num_done, 1 + max(self._num_to_come, self._num_done))
        return self.found[place]

    def close(self) -> None:
        """Write what is not yet in the file."""
        if self.record is not None and self.found:
            self.record.write(self.found, now=True)

    def columns(self) -> Tensor:
        """Loss, that at fixed routing, accuracy and flips on the grid, (4, A) or (4, A, B); nan where not measured."""
        missing = Point(math.nan, math.nan, math.nan, math.nan, 0)
        rows = [self.found.get(place, missing).values for place in self._places()]
        return torch.tensor(rows, dtype=torch.float64).T.reshape(4, *map(len, self.axes))

    @property
    def _origin(self) -> Place:
        return (0.0,) * len(self.axes)

    def _places(self) -> Iterable[Place]:
        return _product(self.axes)


def _check_same(name: str, before: float, now: float) -> None:
    is_same = math.isclose(before, now, rel_tol=_SAME_CENTER) or (math.isnan(before) and math.isnan(now))
    if not is_same:
        raise ValueError(f"resume: expected the same {name}, {now} at the center, got {before} in the file")


def _product(axes: Sequence[Tensor]) -> list[Place]:
    places = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    return [tuple(place) for place in places.tolist()]
