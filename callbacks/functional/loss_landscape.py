"""Loss landscape of a trained model: its loss along one direction, or on a plane, of its parameters."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.batches import Batch, LossFn, as_batches, batch_size, to_device
from moe_heads.callbacks.functional.environment import device_of
from moe_heads.callbacks.functional.landscape.directions import split_direction
from moe_heads.callbacks.functional.landscape.result import LossLandscapeResult
from moe_heads.callbacks.functional.landscape.routing_flips import Choices, choices_of, flip_share
from moe_heads.callbacks.functional.parameters import trainable_parameters
from moe_heads.callbacks.functional.preserve import analysis_mode
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
    on_step: Callable[[int, int], None] | None = None,
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
        on_step: Called after each point with the number of points done and their total, the centre being one more.

    Returns:
        The losses on the grid, with accuracies and routing flips of the same shape.

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
    data = [to_device(batch, device_of(model)) for batch in as_batches(batches)]

    points = torch.cartesian_prod(*axes).reshape(-1, len(axes)).tolist()
    total = len(points) + 1
    report = on_step or (lambda done, total: None)
    with analysis_mode(model, seed), torch.no_grad():
        walk = _Walk(model, directions)
        survey = _Survey(model, loss_fn, accuracy_fn, data, seed)
        centre, choices = survey.measure()
        if not math.isfinite(centre[0]):
            raise ValueError(f"loss_fn: expected a finite loss of the model as it is; got {centre[0]}")
        report(1, total)
        rows = []
        for done, point in enumerate(points, start=2):
            walk.go(point)
            rows.append(survey.measure(choices)[0])
            report(done, total)

    losses, accuracies, flips = torch.tensor(rows, dtype=torch.float64).T.reshape(3, *(len(axis) for axis in axes))
    return LossLandscapeResult(
        alphas=axes[0],
        betas=axes[1] if direction2 is not None else None,
        losses=losses,
        accuracies=None if accuracy_fn is None else accuracies,
        routing_flips=flips if all(choices) else None,
        center_loss=centre[0],
        center_accuracy=None if accuracy_fn is None else centre[1],
        num_samples=survey.num_samples,
        seed=seed,
    )


class _Walk:
    """Moves the parameters in place; `analysis_mode` brings them back. Shared parameters move once."""

    def __init__(self, model: nn.Module, directions: list[dict[str, Tensor]]) -> None:
        named = trainable_parameters(model)
        self._moves = [(p, p.detach().clone(), [d[name] for d in directions]) for name, p in named.items()]

    def go(self, point: list[float]) -> None:
        # always from the start, never from the last point: rounding errors do not add up
        for parameter, start, steps in self._moves:
            place = start.clone()
            for coordinate, step in zip(point, steps, strict=True):
                place.add_(step, alpha=coordinate)
            parameter.data.copy_(place)


class _Survey:
    """Measures loss, accuracy and routing flips of the model as it is at the moment."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        accuracy_fn: Callable[[nn.Module, Batch], Tensor] | None,
        batches: list[Batch],
        seed: int,
    ) -> None:
        self._model, self._loss_fn, self._accuracy_fn, self._batches = model, loss_fn, accuracy_fn, batches
        self._seed = seed
        self._sizes = [batch_size(batch) for batch in batches]
        self.num_samples = sum(self._sizes)

    def measure(self, reference: list[Choices] | None = None) -> tuple[list[float], list[Choices]]:
        """Loss, accuracy and share of flips against ``reference``, and the choices of each batch."""
        torch.manual_seed(self._seed)
        losses, accuracies, choices = [], [], []
        for batch in self._batches:
            with collect_routing(self._model) as routing:
                losses.append(_scalar("loss_fn", self._loss_fn(self._model, batch)))
            choices.append(choices_of(routing))
            if self._accuracy_fn is not None:
                accuracies.append(_scalar("accuracy_fn", self._accuracy_fn(self._model, batch)))
        flips = [flip_share(*pair) for pair in zip(choices, reference or [], strict=False)]
        return [self._mean(losses), self._mean(accuracies), self._mean(flips)], choices

    def _mean(self, values: list[float]) -> float:
        if not values:
            return math.nan
        return sum(value * size for value, size in zip(values, self._sizes, strict=True)) / self.num_samples


def _scalar(name: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
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
