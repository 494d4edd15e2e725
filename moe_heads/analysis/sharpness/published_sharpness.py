"""The procedure of a published study: PyHessian itself, run on any model and loss (Yao et al. 2020)."""

from collections.abc import Iterable

import torch
from torch import nn

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.preserve import analysis_mode
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters
from moe_heads.analysis.sharpness.published.findings import PublishedFindings, judged
from moe_heads.analysis.sharpness.published.loader import Loader
from moe_heads.analysis.sharpness.published.loss_module import LossModule
from moe_heads.analysis.sharpness.published.reach import Reach
from moe_heads.analysis.sharpness.published.run import imported_pyhessian, run_pyhessian
from moe_heads.checks import check_at_least, check_seed

__all__ = ["published_sharpness"]


def published_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    num_eigenvalues: int = 5,
    params: Selection | None = None,
    density: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> PublishedFindings:
    r"""Top eigenvalues, trace and density of the Hessian of a mean loss as PyHessian 0.1 computes them.

    For comparison with published figures. :math:`H = \nabla^2_\theta \frac{1}{N} \sum_i \ell_i`; PyHessian's own code
    runs with its own settings: deflated power iteration, at most 100 steps for each eigenvalue, until it changes by
    less than 1e-3; Hutchinson's estimator, at most 100 samples, until the mean changes by less than 1e-3; stochastic
    Lanczos quadrature, 100 steps from one start vector. `sharpness` needs a fraction of the products and says how
    accurate it is.

    Where PyHessian stops with an error that an addition of zero to the loss avoids, the addition is made and named in
    ``failures``. The model is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch, a deterministic function.
        batches: The data, all of it held in memory. PyHessian weights batches by their samples; it does not cut one
            that does not fit into memory.
        num_eigenvalues: Number of eigenvalues; the study reports five.
        params: The parameters :math:`\theta`: tensors, or names of parameters or modules such as ``["head"]``; by
            default all that require a gradient.
        density: Also ask for the density.
        seed: Seed of torch's global generators, from which PyHessian draws; equal seeds give equal results.
        progress: Shows the products done, and ends the analysis when its time is over; see `Progress`.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default its tensors tell.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of its loss, where that is no mean over the samples; by
            default the number of samples.

    Returns:
        What PyHessian found, unsorted, with true residuals and named failures.

    Raises:
        ImportError: If PyHessian is not installed.
        ValueError: If an argument is out of range, the model has nothing to differentiate, or the loss or its second
            derivative is not finite.
        RuntimeError: If a layer has no second derivative, or PyHessian fails in the eigenvalues or the trace.
        TimeUp: If the time of the progress is over.

    Source:
        Yao, Gholami, Keutzer and Mahoney, PyHessian: neural networks through the lens of the Hessian, 2020; used by
        Rokah et al., arXiv 2601.15021, 2026.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.published_sharpness import published_sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> found = published_sharpness(model, lambda m, batch: m(batch).square().mean(), [x], num_eigenvalues=1)
        >>> round(found.eigenvalues[0], 2), round(found.trace, 2), found.failures[-1]
        (4.0, 5.0, 'density: PyHessian 0.1 calls torch.eig, which torch removed in 1.13; ...')
    """
    imported_pyhessian()
    selected = selected_parameters(model, params)
    num_parameters = sum(p.numel() for p in selected.values())
    check_at_least(1, num_eigenvalues=num_eigenvalues)
    check_seed(seed)
    if num_eigenvalues > num_parameters:
        raise ValueError(
            f"num_eigenvalues: expected 1 to {num_parameters}, the number of parameters, got {num_eigenvalues!r}"
        )
    progress = progress or Progress()
    given = Batches.of(batches, batch_size_fn, batch_weight_fn)
    check_mean(model, loss_fn, given, progress=progress, seed=seed)
    loss_fn = on_copies(loss_fn)
    with analysis_mode(model, seed):
        chosen = {id(p) for p in selected.values()}
        for p in model.parameters():
            p.requires_grad_(id(p) in chosen)  # PyHessian takes whatever requires a gradient
        device = next(iter(selected.values())).device
        data = given.to(device)
        # No graphs kept: they would stay in memory next to those of PyHessian, for a handful of products.
        operator = HessianOperator(model, loss_fn, data, params, graph_memory=0, progress=progress)
        operator.matvec(torch.ones(num_parameters))  # its errors say more than PyHessian's
        reach = Reach.of(model, loss_fn, [piece.batch for piece in data.pieces], selected, progress)
        loader = Loader(data, progress)
        module = LossModule(model, loss_fn, [selected[name] for name in (*reach.idle, *reach.linear)], loader)
        returned = run_pyhessian(module, loader, device, num_eigenvalues=num_eigenvalues, density=density)
        return judged(returned, operator, reach)
