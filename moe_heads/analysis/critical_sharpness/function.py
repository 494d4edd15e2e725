"""Critical sharpness of an update: the step along it at which the loss rises."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.in_step import in_step, ranks_of, work_in_step
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.parameter_path import ParameterPath
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.scalar import checked_scalar
from moe_heads.analysis._shared.shards import local
from moe_heads.analysis.critical_sharpness.line import critical_sharpness_along
from moe_heads.analysis.critical_sharpness.result import CriticalSharpnessResult
from moe_heads.checks import check_at_least, check_positive

__all__ = ["check_search", "check_update", "critical_sharpness", "is_coarse"]


def critical_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    update: Mapping[str, Tensor],
    *,
    learning_rate: float = 1.0,
    start: float = 1.0,
    tolerance: float = 0.05,
    max_passes: int = 12,
    smallest_step: float = 1e-3,
    largest_step: float = 1e5,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> CriticalSharpnessResult:
    r"""Return the critical sharpness of an update :math:`\Delta` of the parameters :math:`\theta`.

    .. math:: \lambda_c = \frac{2}{t_c \eta}, \qquad t_c = \min \{t > 0 : L(\theta + t \Delta) > L(\theta)\}

    It takes forward passes alone, 5 on a quadratic and mostly 5 to 8 on a network, and no derivative. So it works for
    sharded parameters, and for layers without a second derivative. On a quadratic loss with the gradient g and the
    Hessian H, it is :math:`\Delta^T H \Delta / (-g^T \Delta \, \eta)`. For gradient descent this is a weighted mean of
    the eigenvalues of H. For any optimizer, the update lowers the loss exactly if :math:`\lambda_c < 2 / \eta`.

    The steps are evaluated one by one, so a rise between two of them that falls again is not noticed. The value is NaN
    with a ``reason`` if the loss rises at once, or does not rise, within the range of the search. The bounds of the
    result then state what is known.

    The model is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch, a deterministic function.
        batches: The data.
        update: The parameter change by name, such as `update_of` returns it. Parameters without an entry stay.
        learning_rate: :math:`\eta` of the update. With 1.0, the result is in units of the update itself.
        start: First multiple of the update, such as the ``critical_step`` of an earlier result.
        tolerance: Relative width of the bracket at which the search ends. The error of the result is half of it.
        max_passes: Maximum number of forward passes.
        smallest_step: Multiple of the update at which the search ends if the loss rises at once.
        largest_step: Multiple of the update at which the search ends if the loss does not rise.
        seed: Seed of the random numbers of each batch, equal at all steps.
        progress: Shows the progress, and ends the analysis with an error at its time limit; see `Progress`.
        ranks: The processes, each with its part of the samples in ``batches``; see `sharpness`.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of its loss.

    Raises:
        ValueError: If an argument is out of range, a name or shape in ``update`` does not fit the model, or the loss
            before the update is not finite.

    Source:
        The definition is that of arXiv 2601.16979.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import critical_sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> update = {"weight": -0.1 * model.weight.detach()}
        >>> found = critical_sharpness(model, lambda m, x: m(x).square().mean(), [torch.ones(4, 1)], update)
        >>> round(found.critical_step)  # to the other side of the parabola
        20
    """
    check_arguments(model=model, loss_fn=loss_fn, seed=seed, progress=progress, ranks=ranks)
    check_arguments(batch_size_fn=batch_size_fn, batch_weight_fn=batch_weight_fn)
    check_positive(learning_rate=learning_rate, start=start)
    check_search(tolerance, max_passes, smallest_step, largest_step)
    ranks = ranks_of(model, ranks)
    with ranks.synchronized():
        check_update(model, update)
        data = Batches.of(batches, batch_size_fn, batch_weight_fn)
    work_in_step(model, data, ranks)
    progress = progress or Progress()
    microbatches = Microbatches(data, device_of(model), in_step(model, progress, ranks))
    passes = 0
    with analysis_mode(model, seed) as original:
        path = ParameterPath(model, [dict(update)], original)
        losses = _MeanLoss(model, loss_fn, microbatches, seed)

        def loss_at(step: float) -> float:
            nonlocal passes
            with ranks.synchronized():
                path.go([step])
                sums = losses.sums()
            total, weight = ranks.all_reduce(sums).tolist()
            passes += 1
            progress.step(passes, multiple=step)
            return float(total / weight)

        return critical_sharpness_along(
            loss_at,
            learning_rate=learning_rate,
            num_samples=ranks.sum(microbatches.num_samples),
            resolution=lambda: losses.resolution,
            is_coarse=is_coarse(model),
            start=start,
            tolerance=tolerance,
            max_passes=max_passes,
            smallest_step=smallest_step,
            largest_step=largest_step,
        )


class _MeanLoss:
    """Mean loss over batches, with equal random numbers in every evaluation."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, data: Microbatches, seed: int) -> None:
        self._model, self._loss_fn, self._data, self._seed = model, loss_fn, data, seed
        self._graph = GraphOnDemand()
        self.resolution = 0.0

    def sums(self) -> Tensor:
        """Return the weighted sum of the losses and the sum of their weights, (2,), float64."""
        found = [weight * torch.tensor([loss, 1.0], dtype=torch.float64) for weight, loss in self._losses()]
        return torch.stack(found).sum(0)

    def _losses(self) -> Iterator[tuple[float, float]]:
        return self._data.evaluate(self._loss)

    def _loss(self, index: int, batch: Batch) -> float:
        origin = self._data.origins[index]
        torch.manual_seed(self._seed + origin)
        loss = checked_scalar(
            self._graph(lambda: self._loss_fn(self._model, batch)), f"the mean loss of batch {origin}"
        )
        self.resolution = max(self.resolution, torch.finfo(loss.dtype).eps)
        return float(loss.detach())


def is_coarse(model: nn.Module) -> bool:
    """Return whether a model computes in half precision: its parameters are, or autocast is on."""
    is_half = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())
    return is_half or torch.is_autocast_enabled(device_of(model).type)


def check_update(model: nn.Module, update: Mapping[str, Tensor]) -> None:
    """Check that an update has the names and shapes of parameters, and finite values.

    Raises:
        ValueError: If it has not.
    """
    named = dict(model.named_parameters())
    if not isinstance(update, Mapping) or not update:
        raise ValueError(
            f"update: expected a tensor by name of a parameter, got {update!r}. Call update_of(optimizer, model)."
        )
    for name, change in update.items():
        if name not in named:
            raise ValueError(f"update: expected names of parameters such as {next(iter(named))!r}, got {name!r}.")
        shape = tuple(local(named[name]).shape)
        if not isinstance(change, Tensor) or tuple(change.shape) != shape:
            got = tuple(change.shape) if isinstance(change, Tensor) else repr(change)
            raise ValueError(f"update: expected the shape {shape} for {name!r}, got {got}.")
        if not bool(change.isfinite().all()):
            raise ValueError(f"update: expected finite values for {name!r}, got others. The step itself diverged.")


def check_search(tolerance: float, max_passes: int, smallest_step: float, largest_step: float) -> None:
    """Check the options of the search.

    Raises:
        ValueError: If one is out of range.
    """
    check_positive(tolerance=tolerance, smallest_step=smallest_step, largest_step=largest_step)
    check_at_least(4, max_passes=max_passes)
    if smallest_step >= largest_step:
        raise ValueError(f"smallest_step: expected less than largest_step = {largest_step!r}, got {smallest_step!r}.")
