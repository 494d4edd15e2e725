"""Loss along several random directions, which separates the model from the choice of a direction."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.figures import axes_of
from moe_heads.analysis._shared.gathered import gathered
from moe_heads.analysis._shared.in_step import in_step, ranks_of, work_in_step
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.parameter_path import ParameterPath
from moe_heads.analysis._shared.parameters import Selection
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.shards import is_sharded
from moe_heads.analysis._shared.state import Original
from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.loss_landscape.directions import (
    Biases,
    filter_normalized,
    layer_normalized,
    random_direction,
    steps_of,
)
from moe_heads.analysis.loss_landscape.evaluate import NUM_SUMS, Point, PointEvaluator, holds_routing
from moe_heads.analysis.loss_landscape.figures import CARD, legend_above
from moe_heads.analysis.loss_landscape.grid import grid_of
from moe_heads.analysis.loss_landscape.validity import crossing_radius, second_difference
from moe_heads.checks import check_at_least, check_option, check_positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DirectionSweepResult", "Normalization", "direction_sweep", "normalized_random_direction"]

Normalization = Literal["filter", "layer", "none"]
"""Scale of a random direction: the norm of each filter of the model, of each parameter, or unit length as a whole."""

# Outer quantiles of the band: they include most of the directions, whatever their number.
_LOW, _HIGH = 0.1, 0.9


@dataclass(frozen=True, eq=False)
class DirectionSweepResult:
    """Mean loss along several random directions: K directions, A coordinates. All tensors are float64 on the CPU.

    Attributes:
        alphas: Coordinates, (A,).
        losses: Mean loss over the samples, (K, A). Values may be nan or inf.
        losses_fixed_routing: Mean loss with the choices of the center, (K, A), or None without a sparse head.
        routing_flips: Fraction of samples whose set of experts differs from that at the center, (K, A), or None without
            a router.
        center_loss: Loss at the center.
        num_samples: Number of samples.
        seed: Seed of the directions.
        num_unmeasured: Number of directions that were not measured. Zero unless the result is partial.
        partial: Reason why the analysis ended early, or "".
    """

    alphas: Tensor
    losses: Tensor
    losses_fixed_routing: Tensor | None
    routing_flips: Tensor | None
    center_loss: float
    num_samples: int
    seed: int
    num_unmeasured: int = 0
    partial: str = ""

    @property
    def num_nonfinite(self) -> int:
        """Number of points whose loss is nan or inf. At such a step mean and band are not finite either."""
        return int((~self.losses.isfinite()).sum())

    @property
    def mean(self) -> Tensor:
        """Mean over the directions, (A,)."""
        return self.losses.mean(0)

    @property
    def stderr(self) -> Tensor:
        """Standard error of the mean, (A,), nan for one direction."""
        return self.losses.std(0) / math.sqrt(len(self.losses))

    def quantile(self, share: float) -> Tensor:
        """Return the loss that this fraction of the directions stays below, (A,)."""
        return self.losses.quantile(share, dim=0)

    @property
    def curvatures(self) -> tuple[float, ...]:
        """Second difference of each direction at the center, or () if the grid does not provide one."""
        found = [second_difference(self.alphas, row) for row in self.losses]
        return tuple(value for value in found if value is not None)

    def radii(self, rise: float) -> tuple[float, ...]:
        """Return the distance at which the loss has risen by a fraction of the center loss, for each direction.

        It is inf if the loss does not rise that far on the grid.
        """
        level = self.center_loss + rise * abs(self.center_loss)
        return tuple(crossing_radius([self.alphas], row, level, self.center_loss) for row in self.losses)

    def metrics(self) -> dict[str, float]:
        """Return the finite values to log. ``<quantity>_stderr`` is the standard error over the directions."""
        values = {"center_loss": self.center_loss, "num_directions": float(len(self.losses))}
        values["num_nonfinite"] = float(self.num_nonfinite)
        ends = self.losses[:, [0, -1]].mean(1)
        for name, numbers in (
            ("curvature", self.curvatures),
            ("radius_50", self.radii(0.5)),
            ("end_loss", ends.tolist()),
        ):
            values |= _mean_and_error(name, torch.tensor(numbers, dtype=torch.float64))
        values["relative_spread"] = _largest(self.losses.std(0) / self.mean.abs())
        if self.routing_flips is not None:
            values["flips_max"] = _largest(self.routing_flips)
        if self.losses_fixed_routing is not None:
            values["routing_gap_max"] = _largest((self.losses - self.losses_fixed_routing).abs())
        values |= {"num_samples": float(self.num_samples)} | ({"partial": 1.0} if self.partial else {})
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Plot the mean over the directions with a band of quantiles, and the mean at fixed routing.

        Args:
            ax: Axes to draw into. By default new axes in a figure that pyplot does not manage.
        """
        figure, ax = axes_of(ax, CARD)
        alphas = self.alphas.numpy()
        low, high = self.quantile(_LOW), self.quantile(_HIGH)
        ax.fill_between(alphas, low.numpy(), high.numpy(), alpha=0.25, label=f"{_LOW:.0%} to {_HIGH:.0%} quantile")
        ax.plot(alphas, self.mean.numpy(), marker=".", markersize=4, label="mean")
        if self.losses_fixed_routing is not None:
            fixed = self.losses_fixed_routing.mean(0).numpy()
            ax.plot(alphas, fixed, linestyle="--", color="tab:green", label="mean at fixed routing")
        lost = f", {self.num_nonfinite} points not finite" if self.num_nonfinite else ""
        ax.set_xlabel("α (step along the direction)", fontsize=8)
        ax.set_ylabel("loss", fontsize=8)
        legend_above(ax, f"{len(self.losses)} random directions ({self.num_samples} samples{lost})")
        return figure, ax

    def summary(self) -> str:
        """Return a Markdown table of the values, with notes."""
        rows = [(name.replace("_", " "), f"{value:.5g}") for name, value in self.metrics().items()]
        notes = [f"The spread is over the directions at one step. Each direction has {len(self.alphas)} steps."]
        if self.num_nonfinite:
            notes.append(f"{self.num_nonfinite} points have a loss of nan or inf, so mean and band are missing there.")
        if self.partial:
            notes.append(f"**Partial**: {self.partial}. {self.num_unmeasured} directions are missing.")
        return "\n".join([markdown_table(("quantity", "value"), rows), *(f"\n{note}" for note in notes)])

    def save(self, file: "str | os.PathLike[str] | IO[bytes]") -> None:
        """Write an ``.npz`` with ``alphas``, ``losses``, the other tensors if they exist, and ``center_loss``."""
        tensors = {"losses_fixed_routing": self.losses_fixed_routing, "routing_flips": self.routing_flips}
        arrays: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        arrays |= {"alphas": self.alphas, "losses": self.losses, "center_loss": self.center_loss}
        np.savez(file, **arrays)


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.max()) if len(finite) else math.nan


def _mean_and_error(name: str, numbers: Tensor) -> dict[str, float]:
    if len(numbers) < 2:
        return {}
    return {name: float(numbers.mean()), f"{name}_stderr": float(numbers.std() / math.sqrt(len(numbers)))}


def normalized_random_direction(
    model: nn.Module,
    seed: int,
    normalization: Normalization = "filter",
    *,
    params: Selection | None = None,
    biases: Biases = "zero",
) -> Tensor:
    """Return a scaled random direction; see `filter_normalized` and `layer_normalized`. "none" gives unit length."""
    check_option("normalization", normalization, get_args(Normalization))
    direction = random_direction(model, seed, params)
    if normalization == "none":
        unit: Tensor = direction / torch.linalg.vector_norm(direction)
        return unit
    scale = filter_normalized if normalization == "filter" else layer_normalized
    return scale(model, direction, params=params, biases=biases)


def direction_sweep(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    num_directions: int = 10,
    normalization: Normalization = "filter",
    biases: Biases = "zero",
    alphas: Sequence[float] | Tensor | None = None,
    num_points: int = 21,
    reach: float = 1.0,
    params: Selection | None = None,
    fixed_routing: bool | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> DirectionSweepResult:
    r"""Compute the mean loss at :math:`\theta + \alpha d_k` for random directions :math:`d_1, \dots, d_K`.

    One slice represents little of a space of millions of dimensions. The spread between several slices measures that
    limitation. Points are evaluated as in `loss_landscape`. Modules before the moved parameters are evaluated once for
    all directions.

    Args:
        model: The model :math:`\theta`, left bit for bit as it was.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data. All of it is held on the device of the model.
        num_directions: K, at least 2. The standard error of a mean over them falls as its square root.
        normalization: See `normalized_random_direction`.
        biases: Treatment of biases and of the parameters of norm layers, see `filter_normalized`.
        alphas: Coordinates, increasing. Defaults to ``num_points`` equidistant ones in [-reach, reach].
        num_points: Number of coordinates if they are not given.
        reach: Largest coordinate if they are not given. 1 is the norm of each filter.
        params: The parameters that move. By default all that require a gradient.
        fixed_routing: See `loss_landscape`.
        seed: Seed of the directions, which use the seeds ``seed * K``, ``seed * K + 1``, …, and of the random number
            generators at every point.
        progress: Shows the points and enforces the time limit, see `Progress`.
        ranks: The processes that share the work, see `loss_landscape`.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch. By default it is inferred from the
            tensors.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of the loss of a batch, if it is not a mean over the
            samples. Defaults to the number of samples.

    Returns:
        The losses of all directions. If the time limit ends the analysis, those of the finished directions.

    Raises:
        ValueError: If an argument does not fit, the data is empty, or the loss is not finite at the center.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import direction_sweep
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(8, 3)
        >>> sweep = direction_sweep(model, lambda m, batch: m(batch).square().mean(), [x], num_directions=4)
        >>> sweep.losses.shape
        torch.Size([4, 21])
    """
    check_arguments(model=model, loss_fn=loss_fn, seed=seed, progress=progress, ranks=ranks)
    check_arguments(batch_size_fn=batch_size_fn, batch_weight_fn=batch_weight_fn)
    check_at_least(2, num_directions=num_directions, num_points=num_points)
    check_positive(reach=reach)
    axis = grid_of("alphas", alphas, reach, num_points)
    holds = holds_routing(model, fixed_routing)
    progress, ranks = progress or Progress(), ranks_of(model, ranks)
    if params is not None and is_sharded(model):
        with ranks.synchronized():
            data = Batches.of(batches, batch_size_fn, batch_weight_fn)
        part = gathered(model, [loss_fn], data, params, ranks=ranks, progress=progress, seed=seed)
        model, batches, params, (loss_fn, *_) = part.model, part.data, None, part.quantities
        batch_size_fn = batch_weight_fn = None

    def direction(number: int) -> Tensor:
        # int: a generator does not accept integers of NumPy
        return normalized_random_direction(
            model, seed * int(num_directions) + number, normalization, params=params, biases=biases
        )

    with ranks.synchronized():
        data = Batches.of(batches, batch_size_fn, batch_weight_fn)
    work_in_step(model, data, ranks)
    check_mean(model, loss_fn, data, progress=progress, ranks=ranks, seed=seed)
    with analysis_mode(model, seed) as original:
        watched = in_step(model, progress, ranks, alone=progress if ranks.is_rank_zero else Progress())
        with ranks.synchronized():
            microbatches = Microbatches(data, device_of(model), watched)
            paths = _DirectionPaths(model, direction, params, original)
            evaluator = PointEvaluator(model, paths.current, loss_fn, None, microbatches, hold_routing=holds, seed=seed)

        def measure(message: Tensor) -> Tensor:
            number, alpha = round(float(message[0])), float(message[1])
            is_new = not paths.was_used(number)
            evaluator.follow(paths.along(number), is_new=is_new)
            return evaluator.evaluate([alpha]).to(ranks.device)

        def algorithm(total: Callable[[Tensor], Tensor]) -> DirectionSweepResult:
            return _measure(lambda place: total(place.to(ranks.device)), axis, num_directions, seed, progress)

        message = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        return ranks.run_with_sums(measure, algorithm, message, message.new_zeros(NUM_SUMS))


class _DirectionPaths:
    """Paths along the directions, one at a time: all of them would take K times the memory of the parameters."""

    def __init__(
        self,
        model: nn.Module,
        direction: Callable[[int], Tensor],
        params: Selection | None,
        original: Original,
    ) -> None:
        self._model, self._direction, self._params, self._original = model, direction, params, original
        self._number, self._used = 0, {0}
        self.current = self._path()

    def was_used(self, number: int) -> bool:
        """Return whether the model moved along the direction of this number before."""
        return number in self._used

    def along(self, number: int) -> ParameterPath:
        """Return the path along the direction of this number."""
        if number != self._number:
            self.current.go([0.0])  # directions are scaled by the parameters at the center
            self._number = number
            self._used.add(number)
            self.current = self._path()
        return self.current

    def _path(self) -> ParameterPath:
        flat = self._direction(self._number)
        return ParameterPath(self._model, [steps_of(self._model, flat, "direction", self._params)], self._original)


def _measure(
    total: Callable[[Tensor], Tensor], axis: Tensor, num_directions: int, seed: int, progress: Progress
) -> DirectionSweepResult:
    """Measure the center, the end of each direction, then one direction after the other, inwards."""
    center = Point.of(total(torch.zeros(2, dtype=torch.float64)))
    rows: list[list[Point]] = []
    known = [{0.0: center} for _ in range(num_directions)]
    outside = sorted((alpha for alpha in axis.tolist() if alpha), key=lambda alpha: -abs(alpha))
    # the far end of every direction first, where reused outputs are validated
    visits = [(number, outside[0]) for number in range(num_directions)]
    visits += [(number, alpha) for number in range(num_directions) for alpha in outside[1:]]

    def result(partial: str = "") -> DirectionSweepResult:
        columns = torch.tensor([[point.values for point in row] for row in rows], dtype=torch.float64)
        losses, fixed, _, flips = columns.permute(2, 0, 1)
        return DirectionSweepResult(
            alphas=axis,
            losses=losses,
            losses_fixed_routing=None if math.isnan(center.fixed) else fixed,
            routing_flips=None if math.isnan(center.flips) else flips,
            center_loss=center.loss,
            num_samples=center.num_samples,
            seed=seed,
            num_unmeasured=num_directions - len(rows),
            partial=partial,
        )

    try:
        progress.step(1, 1 + len(visits))
        for done, (number, alpha) in enumerate(visits, start=2):
            known[number][alpha] = Point.of(total(torch.tensor([number, alpha], dtype=torch.float64)))
            if known[number].keys() >= {*axis.tolist()}:
                rows.append([known[number][place] for place in axis.tolist()])
                progress.keep(result)
            progress.step(done, 1 + len(visits))
    except TimeUp as error:
        in_time: DirectionSweepResult = progress.result_in_time(error)
        return in_time
    return result()
