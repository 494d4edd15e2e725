"""The direction of largest curvature, without the rest of a sharpness analysis."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.batches import Batch, LossFn
from moe_heads.callbacks.functional.curvature.lanczos import lanczos
from moe_heads.callbacks.functional.curvature.operator import HessianOperator
from moe_heads.callbacks.functional.preserve import analysis_mode

__all__ = ["top_eigenvector"]


def top_eigenvector(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    tolerance: float = 1e-3,
    max_steps: int = 200,
    seed: int = 0,
    on_product: Callable[[int], None] | None = None,
) -> Tensor:
    """Unit eigenvector of the largest eigenvalue of the Hessian, as `sharpness` would find it.

    Args:
        model: The model, left bit for bit as it was.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data.
        tolerance: Relative residual at which to stop.
        max_steps: Most Lanczos steps; what they give is returned, whatever its residual.
        seed: Seed of the starting vector.
        on_product: Called after each Hessian-vector product with their number so far.

    Returns:
        The vector, (P,), on the CPU, in the order of the trainable ``model.named_parameters()``.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks.functional.curvature import top_eigenvector
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> top_eigenvector(model, lambda m, batch: m(batch).square().mean(), [x]).abs().round(decimals=3)
        tensor([0., 1.])
    """
    with analysis_mode(model, seed):
        operator = HessianOperator(model, loss_fn, batches, on_product=on_product)
        generator = torch.Generator().manual_seed(seed)
        found = lanczos(operator, generator=generator, num_eigenvalues=1, tolerance=tolerance, max_steps=max_steps)
        return found.vectors()[0].cpu()
