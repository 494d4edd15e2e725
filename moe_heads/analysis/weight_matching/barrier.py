"""Loss along the straight line between two networks, and its barrier."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.parameter_path import ParameterPath, Target
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.scalar import checked_scalar
from moe_heads.analysis._shared.state import Original, write_back
from moe_heads.analysis.weight_matching.tensors import checked_tensors
from moe_heads.checks import check_at_least

__all__ = ["LineLoss", "line_loss", "mean_loss"]


@dataclass(frozen=True)
class LineLoss:
    r"""Mean loss along the line :math:`(1 - t) \theta_0 + t \theta_1` between two networks.

    Attributes:
        positions: t, ascending from 0 to 1.
        losses: L(t), the mean over the samples.
        batch_losses: L(t) of each batch, by position.
        weights: Weight of each batch in the mean.
        num_samples: Number of samples.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    batch_losses: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    num_samples: int

    @property
    def excesses(self) -> tuple[float, ...]:
        """Loss above the straight line between both ends, L(t) - ((1 - t) L(0) + t L(1))."""
        return _excesses(self.positions, self.losses)

    @property
    def barrier(self) -> float:
        """Largest excess among the positions. It is at least 0, the excess at both ends; nan if a loss is nan."""
        return math.nan if any(map(math.isnan, self.excesses)) else max(self.excesses)

    @property
    def stderr(self) -> float:
        """Standard error of the excess at the position of the barrier from the spread over batches; nan for one."""
        number = len(self.weights)
        if number < 2 or math.isnan(self.barrier):
            return math.nan
        place = self.excesses.index(self.barrier)
        by_batch = [_excesses(self.positions, losses)[place] for losses in zip(*self.batch_losses, strict=True)]
        total = sum(self.weights)
        parts = [
            (weight / total * (value - self.barrier)) ** 2 for weight, value in zip(self.weights, by_batch, strict=True)
        ]
        return math.sqrt(sum(parts) * number / (number - 1))


def line_loss(
    model: nn.Module,
    other: nn.Module | Mapping[str, Tensor],
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    num_points: int = 11,
    seed: int = 0,
    progress: Progress | None = None,
) -> LineLoss:
    """Return the loss along the straight line from a network to another one.

    Floating-point buffers, such as the running statistics of batch norm, are interpolated like the parameters. Other
    buffers are those of the nearer end. The values at both ends are exact.

    Args:
        model: The first network. It is not changed.
        other: The second network, or its parameters and buffers by name.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of a batch.
        batches: The data.
        num_points: Number of equally spaced positions, including both ends.
        seed: Seed of the random numbers of each batch, equal at all positions.
        progress: Receives a step for each position.

    Raises:
        ValueError: If there are fewer than 3 points, or the networks differ in names or shapes.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import line_loss
        >>> model, data = torch.nn.Linear(1, 1, bias=False), [torch.ones(2, 1)]
        >>> _ = torch.nn.init.constant_(model.weight, -1.0)
        >>> line_loss(model, {"weight": torch.ones(1, 1)}, lambda m, x: 1 - m(x).square().mean(), data).barrier
        1.0
    """
    check_arguments(model=model, loss_fn=loss_fn, seed=seed)
    check_at_least(3, num_points=num_points)
    other = checked_tensors(model, other)
    progress = progress or Progress()
    data = Batches.of(batches)
    microbatches = Microbatches(data, device_of(model), progress)
    positions = tuple(place / (num_points - 1) for place in range(num_points))
    found: list[tuple[float, ...]] = []
    with analysis_mode(model, seed) as original:
        move = _Line(model, other, original)
        for position in positions:
            move(position)
            found.append(_losses(model, loss_fn, microbatches, seed))
            progress.step(len(found), num_points)
    weights = tuple(weight for weight in data.weights if weight)
    return LineLoss(
        positions, tuple(_mean(losses, weights) for losses in found), tuple(found), weights, data.num_samples
    )


def mean_loss(model: nn.Module, loss_fn: LossFn, batches: Iterable[Batch], *, seed: int = 0) -> float:
    """Return the mean loss of a model as `line_loss` computes it, without a change of the model."""
    data = Batches.of(batches)
    with analysis_mode(model, seed):
        losses = _losses(model, loss_fn, Microbatches(data, device_of(model), Progress()), seed)
    return _mean(losses, tuple(weight for weight in data.weights if weight))


class _Line:
    """Movement of parameters and buffers along the line."""

    def __init__(self, model: nn.Module, other: Mapping[str, Tensor], original: Original) -> None:
        named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        ends = {name: other[name].detach().to(tensor.device, tensor.dtype) for name, tensor in named.items()}
        moving = {name for name, end in ends.items() if end.is_floating_point() or end.is_complex()}
        self._path = ParameterPath(model, [{name: Target(ends[name]) for name in moving}], original)
        self._others = [
            (named[name], original(named[name]).clone(), end) for name, end in ends.items() if name not in moving
        ]

    def __call__(self, position: float) -> None:
        self._path.go([position])
        for tensor, start, end in self._others:
            write_back(tensor, start if position < 0.5 else end)


def _losses(model: nn.Module, loss_fn: LossFn, data: Microbatches, seed: int) -> tuple[float, ...]:
    """Return the mean loss of each batch."""
    graph = GraphOnDemand()

    def evaluate(index: int, batch: Batch) -> tuple[int, float]:
        origin = data.origins[index]
        torch.manual_seed(seed + origin)
        loss = checked_scalar(graph(lambda: loss_fn(model, batch)), f"the mean loss of batch {origin}")
        return origin, float(loss.detach())

    sums: dict[int, tuple[float, float]] = {}
    for weight, (origin, loss) in data.evaluate(evaluate):
        total, weights = sums.get(origin, (0.0, 0.0))
        sums[origin] = total + weight * loss, weights + weight
    return tuple(total / weights for total, weights in sums.values())


def _mean(losses: tuple[float, ...], weights: tuple[float, ...]) -> float:
    total = sum(weights)
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / total


def _excesses(positions: tuple[float, ...], losses: tuple[float, ...]) -> tuple[float, ...]:
    first, last = losses[0], losses[-1]
    inside = [loss - ((1 - t) * first + t * last) for t, loss in zip(positions, losses, strict=True)][1:-1]
    return (0.0, *inside, 0.0)
