"""Loss landscape of a trained model: its loss along one direction, or on a plane, of its parameters."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import Batch, LossFn
from moe_heads.callbacks.functional.common.environment import device_of
from moe_heads.callbacks.functional.common.graph_on_demand import GraphOnDemand
from moe_heads.callbacks.functional.common.microbatches import Microbatches
from moe_heads.callbacks.functional.common.monitor import Monitor, TimeUp
from moe_heads.callbacks.functional.common.preserve import analysis_mode
from moe_heads.callbacks.functional.common.ranks import Ranks
from moe_heads.callbacks.functional.common.walk import Walk
from moe_heads.callbacks.functional.landscape.directions import split_direction
from moe_heads.callbacks.functional.landscape.result import LossLandscapeResult
from moe_heads.callbacks.functional.landscape.routing_flips import Choices, choices_of, flip_share
from moe_heads.routing import collect_routing

__all__ = ["loss_landscape"]

# Reach of the default grids: that of the study along a unit vector, that of Li et al. on a filter-normalised plane.
_REACH_1D, _REACH_2D = 0.5, 1.0


def loss_landscape(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    direction1: Tensor,
    direction2: Tensor | None = None,
    alphas: Sequence[float] | Tensor | None = None,
    betas: Sequence[float] | Tensor | None = None,
    num_points: int = 21,
    accuracy_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    seed: int = 0,
    monitor: Monitor | None = None,
    ranks: Ranks | None = None,
) -> LossLandscapeResult:
    r"""Mean loss at :math:`\theta + \alpha d_1`, or at :math:`\theta + \alpha d_1 + \beta d_2`.

    :math:`L(\theta) = \frac{1}{N} \sum_i \ell_i(\theta)` over all samples of ``batches``, in evaluation mode. The
    directions are used as they are given: normalise them first (the unit top eigenvector of `sharpness` in one
    dimension; `directions.filter_normalized` of two random directions on a plane). A loss that is nan or inf stays so.

    With routers of this package in the model, the share of samples that choose other experts than at the centre is
    recorded too: where it is not zero, the loss of a sparse head has jumped.

    The model is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error. A loss that draws
    random torch numbers draws the same ones at every point.

    Args:
        model: The model :math:`\theta`.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data; all of it is held on the device of the model. Batches are weighted by their samples.
        direction1: :math:`d_1`, flat, (P,), over the parameters that require a gradient in the order of
            ``model.named_parameters()``.
        direction2: :math:`d_2`, likewise, for a plane.
        alphas: Coordinates along the first direction, increasing; by default ``num_points`` of equal distance in
            [-0.5, 0.5] for a line, in [-1, 1] for a plane. A rounding error in place of zero is taken for zero.
        betas: Coordinates along the second direction; by default as ``alphas`` has it.
        num_points: Number of coordinates where they are not given. An odd number holds the centre; 21 as in the study.
        accuracy_fn: ``accuracy_fn(model, batch) -> scalar``, the mean over the samples, also evaluated everywhere.
        seed: Seed of the random number generators at every point.
        monitor: Shows the points, the centre first, and ends the analysis when its time is over; see
            `Monitor`.
        ranks: The processes that share the work, each with its part of the samples in ``batches``; all of them call
            this function with the same directions and grids, and get the result. By default this process has all
            samples.

    Returns:
        The losses on the grid, with accuracies and routing flips of the same shape. When the time of the monitor is
        over, those near the centre, marked by ``partial``.

    Raises:
        ValueError: If a direction or grid does not fit, the data is empty, or the loss is not a scalar or not finite at
            the centre.

    Source:
        Goodfellow, Vinyals and Saxe, arXiv 1412.6544 (line); Li et al., arXiv 1712.09913 (plane).

    Example:
        >>> import torch
        >>> from moe_heads.callbacks.functional.loss_landscape import loss_landscape
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> x = torch.ones(4, 1)
        >>> line = loss_landscape(model, lambda m, batch: m(batch).square().mean(), [x],
        ...                       direction1=torch.ones(1), alphas=[-1.0, 0.0, 1.0])
        >>> line.losses, line.curvatures
        (tensor([1., 4., 9.], dtype=torch.float64), (2.0,))
    """
    directions = [split_direction(model, direction1, "direction1")]
    if direction2 is not None:
        directions.append(split_direction(model, direction2, "direction2"))
    elif betas is not None:
        raise ValueError("betas: expected None without a direction2; got coordinates")
    if num_points < 2:
        raise ValueError(f"num_points: expected at least 2; got {num_points}")
    reach = _REACH_1D if direction2 is None else _REACH_2D
    axes = [_grid("alphas", alphas, reach, num_points)]
    if direction2 is not None:
        axes.append(_grid("betas", betas, reach, num_points))
    monitor, ranks = monitor or Monitor(), ranks or Ranks()
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))

    def lead(total: Callable[[Tensor], Tensor]) -> LossLandscapeResult:
        centre = _Point.of(total(torch.zeros(len(axes), dtype=torch.float64, device=ranks.device)))
        if not math.isfinite(centre.loss):
            raise ValueError(f"loss_fn: expected a finite loss of the model as it is; got {centre.loss}")
        distances = points.norm(dim=1)
        found = dict.fromkeys((distances == 0).nonzero().flatten().tolist(), centre)
        num_steps = 1 + len(points) - len(found)

        def result(partial: str = "") -> LossLandscapeResult:
            missing = _Point(math.nan, math.nan, math.nan, 0)
            rows = [[p.loss, p.accuracy, p.flips] for p in (found.get(i, missing) for i in range(len(points)))]
            losses, accuracies, flips = torch.tensor(rows, dtype=torch.float64).T.reshape(3, *map(len, axes))
            return LossLandscapeResult(
                alphas=axes[0],
                betas=axes[1] if direction2 is not None else None,
                losses=losses,
                accuracies=None if accuracy_fn is None else accuracies,
                routing_flips=None if math.isnan(centre.flips) else flips,
                center_loss=centre.loss,
                center_accuracy=None if accuracy_fn is None else centre.accuracy,
                num_samples=centre.num_samples,
                seed=seed,
                num_unmeasured=len(points) - len(found),
                partial=partial,
            )

        try:
            monitor.step(1, num_steps)
            # from the centre outwards: what is there when the time is over is a disc, not some rows
            outwards = [index for index in distances.argsort(stable=True).tolist() if index not in found]
            for done, index in enumerate(outwards, start=2):
                found[index] = _Point.of(total(points[index].to(ranks.device)))
                monitor.keep(result)
                monitor.step(done, num_steps)
        except TimeUp as error:
            in_time: LossLandscapeResult = monitor.result_in_time(error)
            return in_time
        return result()

    with analysis_mode(model, seed):
        with ranks.together():
            walk = Walk(model, directions)
            data = Microbatches(batches, device_of(model), monitor if ranks.leads else Monitor())
            survey = _Survey(model, walk, loss_fn, accuracy_fn, data, seed)
        coordinates = torch.zeros(len(axes), dtype=torch.float64, device=ranks.device)
        return ranks.led(
            lambda point: survey.measure(point.tolist()).to(ranks.device), lead, coordinates, coordinates.new_zeros(5)
        )


@dataclass
class _Point:
    """Means over the samples at one point."""

    loss: float
    accuracy: float
    flips: float
    num_samples: int

    @classmethod
    def of(cls, sums: Tensor) -> "_Point":
        loss, accuracy, flips, num_routed, num_samples = sums.tolist()
        return cls(
            loss / num_samples,
            accuracy / num_samples,
            flips / num_routed if num_routed else math.nan,
            round(num_samples),
        )


class _Survey:
    """Measures loss, accuracy and routing flips of the model at a point."""

    def __init__(
        self,
        model: nn.Module,
        walk: Walk,
        loss_fn: LossFn,
        accuracy_fn: Callable[[nn.Module, Batch], Tensor] | None,
        data: Microbatches,
        seed: int,
    ) -> None:
        self._model, self._walk, self._loss_fn, self._accuracy_fn = model, walk, loss_fn, accuracy_fn
        self._data, self._seed = data, seed
        self._reference: list[Choices] = []
        self._graph = GraphOnDemand()

    def measure(self, point: list[float]) -> Tensor:
        """Sums over the samples: of loss, accuracy, flips, of the samples that were routed, and of all; float64."""
        self._walk.go(point)
        rows, choices = self._evaluate()
        if not any(point):
            self._reference = choices
        elif len(choices) != len(self._reference):
            # batches were cut since the centre was measured
            self._walk.go([0.0] * len(point))
            _, self._reference = self._evaluate()
        total = torch.zeros(5, dtype=torch.float64)
        for (size, loss, accuracy), here, there in zip(rows, choices, self._reference, strict=True):
            flips = flip_share(here, there)
            routed = 0 if math.isnan(flips) else size
            values = [size * loss, size * accuracy, routed and size * flips, routed, size]
            total += torch.tensor(values, dtype=torch.float64)
        return total

    def _evaluate(self) -> tuple[list[tuple[int, float, float]], list[Choices]]:
        torch.manual_seed(self._seed)
        found = list(self._data.evaluate(self._evaluate_batch))
        rows = [(size, loss, accuracy) for size, (loss, accuracy, _) in found]
        return rows, [choices for _, (_, _, choices) in found]

    def _evaluate_batch(self, index: int, batch: Batch) -> tuple[float, float, Choices]:
        return self._graph(lambda: self._values(batch))

    def _values(self, batch: Batch) -> tuple[float, float, Choices]:
        with collect_routing(self._model) as routing:
            loss = _scalar("loss_fn", self._loss_fn(self._model, batch))
        accuracy = (
            math.nan if self._accuracy_fn is None else _scalar("accuracy_fn", self._accuracy_fn(self._model, batch))
        )
        return loss, accuracy, choices_of(routing)


def _scalar(name: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name}: expected a scalar tensor, the mean over the samples of the batch; got {got}")


def _grid(name: str, values: Sequence[float] | Tensor | None, reach: float, num_points: int) -> Tensor:
    if values is None:
        # from whole numbers, so that the middle of an odd grid is exactly zero
        steps = torch.arange(num_points, dtype=torch.float64) * 2 - (num_points - 1)
        return steps * (reach / (num_points - 1))
    grid = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if grid.dim() != 1 or len(grid) < 2 or not bool(grid.isfinite().all()) or not bool((grid.diff() > 0).all()):
        raise ValueError(f"{name}: expected at least two finite, increasing numbers; got {grid.tolist()}")
    # torch.linspace misses the zero in its middle by a rounding error; the centre has to be the centre
    return torch.where(grid.abs() < 1e-6 * grid.diff().min(), 0, grid)
