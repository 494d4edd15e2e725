"""Curvature of a loss along given directions."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.in_step import ranks_of
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.sharpness.hessian.parameters import Selection
from moe_heads.analysis.sharpness.hessian.shared import shared_hessian
from moe_heads.analysis.sharpness.hessian.weighted_sum import WeightedSum

__all__ = ["directional_curvatures"]


def directional_curvatures(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    directions: Sequence[Tensor],
    *,
    params: Selection | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> tuple[float, ...]:
    r"""Return :math:`d^\top H d` along each direction, by one Hessian-vector product each.

    Args:
        model: The model, left bit for bit as it was.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data.
        directions: Vectors d, each (P,), which are not normalized.
        params: The parameters of the directions; by default all that require a gradient.
        seed: Seed of the random number generators.
        progress: Checked before each batch.
        ranks: The processes that share the samples; see `sharpness`.
        batch_size_fn: See `HessianOperator`.
        batch_weight_fn: See `HessianOperator`.

    Raises:
        ValueError: If a layer has no second derivative, and products by differences of gradients depend on the step.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.hessian import directional_curvatures
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> directional_curvatures(model, lambda m, batch: m(batch).square().mean(), [x], torch.eye(2).unbind())
        (1.0, 4.0)
    """

    def algorithm(operator: WeightedSum) -> tuple[float, ...]:
        vectors = [direction.to(operator.device, operator.dtype) for direction in directions]
        return tuple(float(vector.double() @ operator.matvec(vector).double()) for vector in vectors)

    with analysis_mode(model, seed):
        # The preparations that make many products cheaper do not pay off for a few.
        return shared_hessian(
            ranks_of(model, ranks),
            algorithm,
            model,
            loss_fn,
            batches,
            params=params,
            mode="rebuilt",
            progress=progress,
            seed=seed,
            batch_size_fn=batch_size_fn,
            batch_weight_fn=batch_weight_fn,
        )
