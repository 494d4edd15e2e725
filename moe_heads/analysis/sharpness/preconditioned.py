"""Largest eigenvalues of the Hessian in the metric of an adaptive optimizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.sharpness.hessian.basis import norm
from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult, lanczos
from moe_heads.analysis.sharpness.hessian.parameters import selected_parameters
from moe_heads.analysis.sharpness.hessian.scaled import ScaledOperator
from moe_heads.analysis.sharpness.hessian.shared import shared_hessian
from moe_heads.analysis.sharpness.hessian.weighted_sum import WeightedSum

__all__ = ["PreconditionedSharpnessResult", "preconditioned_sharpness"]


@dataclass(frozen=True, eq=False)
class PreconditionedSharpnessResult:
    r"""Largest eigenvalues of :math:`D^{-1/2} H D^{-1/2}`.

    Attributes:
        eigenvalues: The largest eigenvalues, descending.
        residuals: Relative residual of each, that of the first from one more product.
        converged: Whether the residuals met the tolerance, and a check found no missing eigenvalue.
        num_products: Number of Hessian-vector products.
        num_parameters: P.
        tolerance: The tolerance.
        threshold: Value above which the steps of the optimizer are unstable, None if it is unknown.
        start: Sum of the eigenvectors, (P,) on the CPU, a start vector for later weights.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: bool
    num_products: int
    num_parameters: int
    tolerance: float
    start: Tensor
    threshold: float | None = None

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue."""
        return self.eigenvalues[0]

    def metrics(self) -> dict[str, float]:
        """Return the numbers for loggers."""
        threshold = {} if self.threshold is None else {"threshold": self.threshold}
        return {"lambda_max": self.lambda_max, "residual": max(self.residuals), **threshold}

    def summary(self) -> str:
        """Return the numbers as a table in Markdown."""
        rows = [
            (f"λ{rank}", f"{value:.5g}", f"{residual:.1e}")
            for rank, (value, residual) in enumerate(zip(self.eigenvalues, self.residuals, strict=True), start=1)
        ]
        if self.threshold is not None:
            rows.append(("stability threshold", f"{self.threshold:.5g}", ""))
        rows.append(("Hessian-vector products", f"{self.num_products}", ""))
        table = markdown_table(("quantity", "value", "relative residual"), rows)
        return table if self.converged else f"{table}\n\nThe eigenvalues did not converge. Raise max_steps."


def preconditioned_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    preconditioner: Mapping[str, Tensor],
    *,
    num_eigenvalues: int = 1,
    tolerance: float = 1e-3,
    max_steps: int = 200,
    start: Tensor | None = None,
    threshold: float | None = None,
    seed: int = 0,
    graph_memory: int | None = None,
    basis_memory: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> PreconditionedSharpnessResult:
    r"""Return the largest eigenvalues of :math:`D^{-1/2} H D^{-1/2}` with the diagonal D of an adaptive optimizer.

    They decide whether its steps are stable, as those of H decide it for gradient descent: a step divides the gradient
    by D, and its matrix :math:`D^{-1} H` has the same eigenvalues. `sharpness` documents H, and the search for missing
    eigenvalues. The model is evaluated inside `analysis_mode` and left bit for bit as it was.

    Args:
        model: The model. Its parameters are whole in each process.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch, a deterministic function.
        batches: The data.
        preconditioner: D by name of the parameter, positive, such as `preconditioner_of` returns it. Parameters without
            an entry are held fixed.
        num_eigenvalues: Number of eigenvalues.
        tolerance: Largest relative residual.
        max_steps: Maximum number of Lanczos steps.
        start: Start vector (P,) in the order of the model's parameters, such as the ``start`` of an earlier result.
        threshold: Stability threshold to keep with the result.
        seed: Seed of the random vectors.
        graph_memory: See `sharpness`.
        basis_memory: See `sharpness`.
        progress: Shows the progress, and ends the analysis with an error at its time limit; see `Progress`.
        ranks: The processes that share the samples; see `sharpness`.
        batch_size_fn: See `sharpness`.
        batch_weight_fn: See `sharpness`.

    Raises:
        ValueError: If an argument is out of range, or the preconditioner does not fit the parameters.

    Source:
        Cohen et al., Adaptive gradient methods at the edge of stability, arXiv 2207.14484, 2022.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import preconditioned_sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> d = {"weight": torch.tensor([[0.1, 1.0]])}
        >>> round(preconditioned_sharpness(model, lambda m, x: m(x).square().mean(), [x], d).lambda_max, 3)
        10.0
    """
    check_arguments(model=model, loss_fn=loss_fn, seed=seed, progress=progress, ranks=ranks)
    if not isinstance(preconditioner, Mapping) or not preconditioner:
        raise ValueError(f"preconditioner: expected a tensor by name of a parameter, got {preconditioner!r}.")
    selected = selected_parameters(model, list(preconditioner))
    for name, parameter in selected.items():
        diagonal = preconditioner.get(name)
        if not isinstance(diagonal, Tensor) or diagonal.shape != parameter.shape:
            got = "none" if diagonal is None else f"{tuple(diagonal.shape)}"
            raise ValueError(f"preconditioner: expected shape {tuple(parameter.shape)} for {name!r}, got {got}.")
        if not bool((diagonal > 0).all() and diagonal.isfinite().all()):
            raise ValueError(f"preconditioner: expected finite numbers above 0 for {name!r}, got others.")
    progress, ranks = progress or Progress(), ranks or Ranks()
    diagonal = torch.cat([preconditioner[name].detach().flatten() for name in selected])

    def show(krylov: LanczosResult) -> None:
        progress.step(krylov.num_steps, residual=max(krylov.residuals))

    def algorithm(operator: WeightedSum) -> PreconditionedSharpnessResult:
        scaled = ScaledOperator(operator, diagonal.to(operator.device, torch.float64).rsqrt().to(operator.dtype))
        krylov = lanczos(
            scaled,
            generator=torch.Generator().manual_seed(seed),
            num_eigenvalues=num_eigenvalues,
            tolerance=tolerance,
            max_steps=max_steps,
            start=start,
            basis_memory=basis_memory,
            on_step=show,
        )
        return _result(scaled, krylov, operator, tolerance, threshold)

    with analysis_mode(model, seed):
        return shared_hessian(
            ranks,
            algorithm,
            model,
            loss_fn,
            batches,
            params=list(selected),
            graph_memory=graph_memory,
            progress=progress,
            seed=seed,
            batch_size_fn=batch_size_fn,
            batch_weight_fn=batch_weight_fn,
        )


def _result(
    scaled: ScaledOperator, krylov: LanczosResult, operator: WeightedSum, tolerance: float, threshold: float | None
) -> PreconditionedSharpnessResult:
    vectors = krylov.vectors()
    first = vectors[0].to(scaled.device, scaled.dtype)
    true = norm(scaled.matvec(first).sub_(first, alpha=krylov.eigenvalues[0]))
    norms = krylov.residual_norms.flip(0)[: len(krylov.eigenvalues)].tolist()
    norms[0] = max(norms[0], true)
    tiny = torch.finfo(torch.float64).tiny
    residuals = tuple(each / max(abs(v), tiny) for each, v in zip(norms, krylov.eigenvalues, strict=True))
    return PreconditionedSharpnessResult(
        eigenvalues=krylov.eigenvalues,
        residuals=residuals,
        converged=krylov.have_converged(norms),
        num_products=operator.num_products,
        num_parameters=operator.num_parameters,
        tolerance=tolerance,
        threshold=threshold,
        start=vectors.sum(0).cpu(),
    )
