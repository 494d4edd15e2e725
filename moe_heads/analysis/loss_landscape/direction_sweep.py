"""Loss along several random directions: what of a landscape belongs to the model, and what to the direction."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.parameter_path import ParameterPath
from moe_heads.analysis._shared.parameters import Selection
from moe_heads.analysis._shared.preserve import Original, analysis_mode
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.loss_landscape.directions import (
    Biases,
    filter_normalized,
    layer_normalized,
    random_direction,
    steps_of,
)
from moe_heads.analysis.loss_landscape.grid import grid_of
from moe_heads.analysis.loss_landscape.point import NUM_SUMS, Point
from moe_heads.analysis.loss_landscape.survey import Survey, can_hold_routing
from moe_heads.analysis.loss_landscape.sweep_result import DirectionSweepResult
from moe_heads.checks import check_at_least, check_option, check_positive, check_seed

__all__ = ["Normalization", "direction_sweep", "normalized_random_direction"]

Normalization = Literal["filter", "layer", "none"]
"""What a random direction is scaled to: each filter of the model, each parameter, or unit length as a whole."""


def normalized_random_direction(
    model: nn.Module,
    seed: int,
    normalization: Normalization = "filter",
    *,
    params: Selection | None = None,
    biases: Biases = "zero",
) -> Tensor:
    """A random direction, scaled; see `filter_normalized`, `layer_normalized`; "none" gives one of unit length."""
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
    r"""Mean loss at :math:`\theta + \alpha d_k` for random directions :math:`d_1, \dots, d_K`.

    One slice says little about a space of millions of dimensions; the spread between several says how little. Evaluated
    as `loss_landscape` does it, with what lies before the moved parameters computed once for all directions.

    Args:
        model: The model :math:`\theta`, left bit for bit as it was.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data; all of it is held on the device of the model.
        num_directions: K, at least 2. The standard error of a mean over them falls as its square root.
        normalization: See `normalized_random_direction`.
        biases: What becomes of biases and the parameters of norm layers; see `filter_normalized`.
        alphas: Coordinates, increasing; by default ``num_points`` of equal distance in [-reach, reach].
        num_points: Number of coordinates where they are not given.
        reach: Largest coordinate where they are not given; 1 is the norm of each filter.
        params: The parameters that move; by default all that require a gradient.
        fixed_routing: See `loss_landscape`.
        seed: Seed of the directions, which are those of the seeds ``seed * K``, ``seed * K + 1``, …, and of the random
            number generators at every point.
        progress: Shows the points and ends the analysis when its time is over; see `Progress`.
        ranks: The processes that share the work; see `loss_landscape`.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default its tensors tell.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of its loss, where that is no mean over the samples; by
            default the number of samples.

    Returns:
        The losses of all directions, those that were finished when the time of the progress is over.

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
    check_at_least(2, num_directions=num_directions, num_points=num_points)
    check_positive(reach=reach)
    check_seed(seed)
    axis = grid_of("alphas", alphas, reach, num_points)
    holds = can_hold_routing(model) if fixed_routing is None else fixed_routing
    progress, ranks = progress or Progress(), ranks or Ranks()

    def direction(number: int) -> Tensor:
        # int: a generator takes no whole numbers of NumPy
        return normalized_random_direction(
            model, seed * int(num_directions) + number, normalization, params=params, biases=biases
        )

    with ranks.synchronized():
        given = Batches.of(batches, batch_size_fn, batch_weight_fn)
    check_mean(model, loss_fn, given, progress=progress, ranks=ranks, seed=seed)
    with analysis_mode(model, seed) as original:
        with ranks.synchronized():
            data = Microbatches(given, device_of(model), progress if ranks.is_rank_zero else Progress())
            fan = _Fan(model, direction, params, original)
            survey = Survey(model, fan.walk, loss_fn, None, data, hold_routing=holds, seed=seed)

        def measure(message: Tensor) -> Tensor:
            number, alpha = message.tolist()
            is_new = not fan.has_seen(round(number))
            survey.turn_to(fan.turned(round(number)), is_new=is_new)
            return survey.measure([alpha]).to(ranks.device)

        def algorithm(total: Callable[[Tensor], Tensor]) -> DirectionSweepResult:
            return _swept(lambda place: total(place.to(ranks.device)), axis, num_directions, seed, progress)

        message = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        return ranks.run_with_sums(measure, algorithm, message, message.new_zeros(NUM_SUMS))


class _Fan:
    """Walks along the directions, one at a time: all of them would take K times the memory of the parameters."""

    def __init__(
        self,
        model: nn.Module,
        direction: Callable[[int], Tensor],
        params: Selection | None,
        original: Original,
    ) -> None:
        self._model, self._direction, self._params, self._original = model, direction, params, original
        self._number, self._seen = 0, {0}
        self.walk = self._walk()

    def has_seen(self, number: int) -> bool:
        """Whether it has walked along the direction of that number before."""
        return number in self._seen

    def turned(self, number: int) -> ParameterPath:
        """The walk along the direction of that number."""
        if number != self._number:
            self.walk.go([0.0])  # directions are scaled by the model as it was
            self._number = number
            self._seen.add(number)
            self.walk = self._walk()
        return self.walk

    def _walk(self) -> ParameterPath:
        flat = self._direction(self._number)
        return ParameterPath(self._model, [steps_of(self._model, flat, "direction", self._params)], self._original)


def _swept(
    total: Callable[[Tensor], Tensor], axis: Tensor, num_directions: int, seed: int, progress: Progress
) -> DirectionSweepResult:
    """Measure the end of each direction, then one after the other, inwards; the center is the same of all."""
    center = Point.of(total(torch.zeros(2, dtype=torch.float64)))
    if not math.isfinite(center.loss):
        raise ValueError(f"loss_fn: expected a finite loss of the model as it is, got {center.loss}")
    rows: list[list[Point]] = []
    known = [{0.0: center} for _ in range(num_directions)]
    outside = sorted((alpha for alpha in axis.tolist() if alpha), key=lambda alpha: -abs(alpha))
    # the far end of every direction first: what is computed once is compared with plain passes there
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
