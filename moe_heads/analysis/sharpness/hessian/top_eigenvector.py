"""Directions of largest curvature, without the rest of a sharpness analysis."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.in_step import ranks_of
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult, lanczos
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters
from moe_heads.analysis.sharpness.hessian.shared import shared_hessian
from moe_heads.analysis.sharpness.hessian.weighted_sum import WeightedSum
from moe_heads.checks import check_at_least

__all__ = ["top_eigenvector", "top_eigenvectors"]


def top_eigenvector(model: nn.Module, loss_fn: LossFn, batches: Iterable[Batch], **options: Any) -> Tensor:
    """Return the first of `top_eigenvectors`, (P,), with the same options.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.hessian import top_eigenvector
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> top_eigenvector(model, lambda m, batch: m(batch).square().mean(), [x]).abs().round(decimals=3)
        tensor([0., 1.])
    """
    return top_eigenvectors(model, loss_fn, batches, num_eigenvectors=1, **options)[0]


def top_eigenvectors(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    num_eigenvectors: int,
    params: Selection | None = None,
    tolerance: float = 1e-3,
    max_steps: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> Tensor:
    """Return the unit eigenvectors of the largest eigenvalues of the Hessian, computed as in `sharpness`.

    Args:
        model: The model, left bit for bit as it was.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data.
        num_eigenvectors: Number of eigenvectors.
        params: The parameters; by default all that require a gradient.
        tolerance: Largest relative residual.
        max_steps: Maximum number of Lanczos steps. Their result is returned whatever its residual is.
        seed: Seed of the starting vector.
        progress: Progress and time limit; see `Progress`.
        ranks: The processes that share the samples; see `sharpness`.
        batch_size_fn: See `HessianOperator`.
        batch_weight_fn: See `HessianOperator`.

    Returns:
        The vectors, (``num_eigenvectors``, P), on the CPU, in the order of the trainable ``model.named_parameters()``.

    Raises:
        ValueError: If there are fewer parameters than requested eigenvectors.
    """
    num_parameters = sum(p.numel() for p in selected_parameters(model, params, allows_shards=True).values())
    check_at_least(1, num_eigenvectors=num_eigenvectors)
    if num_eigenvectors > num_parameters:
        raise ValueError(f"num_eigenvectors: expected 1 to {num_parameters}, got {num_eigenvectors}")
    progress, ranks = progress or Progress(), ranks_of(model, ranks)

    def show(krylov: LanczosResult) -> None:
        progress.step(krylov.num_steps, residual=max(krylov.residuals))

    def algorithm(operator: WeightedSum) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"tolerance": tolerance, "max_steps": max_steps, "on_step": show}
        return lanczos(operator, generator=generator, num_eigenvalues=num_eigenvectors, **options).vectors().cpu()

    with analysis_mode(model, seed):
        return shared_hessian(
            ranks,
            algorithm,
            model,
            loss_fn,
            batches,
            params=params,
            progress=progress,
            seed=seed,
            batch_size_fn=batch_size_fn,
            batch_weight_fn=batch_weight_fn,
        )
