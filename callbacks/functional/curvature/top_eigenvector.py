"""The direction of largest curvature, without the rest of a sharpness analysis."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import Batch, LossFn
from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.functional.common.preserve import analysis_mode
from moe_heads.callbacks.functional.common.ranks import Ranks
from moe_heads.callbacks.functional.curvature.lanczos import LanczosResult, lanczos
from moe_heads.callbacks.functional.curvature.operator import HessianOperator
from moe_heads.callbacks.functional.curvature.shared import shared_hessian

__all__ = ["top_eigenvector"]


def top_eigenvector(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    tolerance: float = 1e-3,
    max_steps: int = 200,
    seed: int = 0,
    monitor: Monitor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Unit eigenvector of the largest eigenvalue of the Hessian, as `sharpness` would find it.

    Args:
        model: The model, left bit for bit as it was.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data.
        tolerance: Relative residual at which to stop.
        max_steps: Most Lanczos steps; what they give is returned, whatever its residual.
        seed: Seed of the starting vector.
        monitor: Progress and time limit; see `Monitor`.
        ranks: The processes among which the samples are shared; see `sharpness`.

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
    monitor, ranks = monitor or Monitor(), ranks or Ranks()

    def show(krylov: LanczosResult) -> None:
        monitor.step(krylov.num_steps, residual=max(krylov.residuals))

    def lead(operator: HessianOperator) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"tolerance": tolerance, "max_steps": max_steps, "on_step": show}
        return lanczos(operator, generator=generator, num_eigenvalues=1, **options).vectors()[0].cpu()

    with analysis_mode(model, seed):
        return shared_hessian(ranks, lead, model, loss_fn, batches, monitor=monitor)
