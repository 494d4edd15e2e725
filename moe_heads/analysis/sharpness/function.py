"""Sharpness of a trained model: the spectrum of the Hessian of its loss."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.gathered import gathered
from moe_heads.analysis._shared.in_step import ranks_of
from moe_heads.analysis._shared.mean_check import CutDependence, check_mean
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.shards import is_sharded
from moe_heads.analysis.sharpness.checks import certified
from moe_heads.analysis.sharpness.hessian.blocks import default_blocks, expert_places, places_of
from moe_heads.analysis.sharpness.hessian.both_ends import Which, lower_end
from moe_heads.analysis.sharpness.hessian.density import has_settled
from moe_heads.analysis.sharpness.hessian.double_check import LEAN_ABOVE
from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult, check_basis_memory, lanczos
from moe_heads.analysis.sharpness.hessian.output_loss import OutputLossFn, OutputsFn
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters, slices_of
from moe_heads.analysis.sharpness.hessian.products import Matrix
from moe_heads.analysis.sharpness.hessian.shared import shared_hessian
from moe_heads.analysis.sharpness.hessian.submatrix import DiagonalBlock
from moe_heads.analysis.sharpness.hessian.trace import Places, deflated_trace
from moe_heads.analysis.sharpness.hessian.weighted_sum import WeightedSum
from moe_heads.analysis.sharpness.model_outputs import check_same_loss, output_loss_of
from moe_heads.analysis.sharpness.options import check_sharpness_options
from moe_heads.analysis.sharpness.record import SharpnessRecord
from moe_heads.analysis.sharpness.result import SharpnessResult
from moe_heads.analysis.sharpness.supplements import check_supplements, supplemented
from moe_heads.checks import check_flags

__all__ = ["sharpness"]

# Steps after which the density of a trained network shows no visible change, and the fewest before it is examined.
_DENSITY_STEPS, _FEWEST_DENSITY_STEPS = 40, 16

# Up to this number of parameters, a density takes all eigenvalues and is exact.
_MAX_EXACT = 100


def sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    matrix: Matrix = "hessian",
    outputs_fn: OutputsFn | None = None,
    output_loss: OutputLossFn | None = None,
    params: Selection | None = None,
    num_eigenvalues: int = 5,
    which: Which = "largest",
    tolerance: float = 1e-3,
    trace_tolerance: float = 0.05,
    max_steps: int = 200,
    max_probes: int = 100,
    density: bool = True,
    blocks: Mapping[str, Sequence[str]] | None = None,
    block_eigenvalues: bool = False,
    keep_eigenvectors: bool = False,
    routing_steps: Sequence[float] = (),
    perturbation: bool = False,
    start: Tensor | None = None,
    seed: int = 0,
    graph_memory: int | None = None,
    basis_memory: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
    trace: bool = True,
    skip_double_check: str = "",
) -> SharpnessResult:
    r"""Return the top eigenvalues, the trace and the spectral density of the Hessian of a model's mean loss.

    :math:`H = \nabla^2_\theta L`, :math:`L = \frac{1}{N} \sum_i \ell_i`, over all samples of ``batches``, in
    evaluation mode. One Lanczos iteration with full reorthogonalization gives the eigenvalues with their residuals, the
    density by Gauss quadrature, and the space on which the trace is exact. A few random probes add the rest of the
    trace with its standard error. The same numbers locate the curvature: the result holds the share of each eigenvector
    and the trace for each block of parameters and for each expert.

    With hard routing (top-k experts) the loss is smooth only while no sample is routed to other experts. H is the
    Hessian at fixed routing, and `routing_response` measures how far that holds. The same is true of the kinks of ReLU
    and max-pooling.

    ``converged`` is a certificate. Some further products search for missing eigenvalues, such as copies of a repeated
    one. On a part of the samples the products are compared with float64, and the gradient with a finite difference of
    the loss. Two more checks cover the symmetry of the products and whether the loss is a mean over the samples. A
    failed check warns, and so do eigenvalues that missed their tolerance. Rounding is part of the residuals and of the
    standard error of the trace. ``certificate`` of the result lists the checks.

    Up to 100 parameters a density takes all eigenvalues, and trace and density are exact.

    If a layer has no second derivative (CTC loss, a custom autograd function marked once_differentiable), the products
    are differences of gradients at two steps, in float64 where the model can be evaluated in it. The certificate has
    their error, and an error is raised where the two steps disagree. The same holds for the parameters of a model
    sharded by FSDP2, which have no second derivatives in torch. With ``params``, the selected parameters are
    gathered in each process, and the products are exact. Rank zero holds whole vectors.

    With ``matrix="gauss_newton"`` all of this holds for the Gauss-Newton matrix
    :math:`G = \frac{1}{N} \sum_i J_i^\top H_i J_i` of a loss :math:`\ell_i(f_i(\theta))`, with :math:`J_i` the Jacobian
    of the outputs :math:`f_i` and :math:`H_i` the Hessian of the loss with respect to them. G is H without the
    curvature of the outputs, and has no negative eigenvalues if the loss is convex in the outputs.

    The model is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch, a deterministic function.
        batches: The data, all of it held in memory. Batches of different sizes are weighted by their samples. Up to 16,
            more batches reduce the number of probes for the trace, because each batch gets its own random vectors.
        matrix: "hessian" or "gauss_newton".
        outputs_fn: ``outputs_fn(model, batch) -> outputs`` for the Gauss-Newton matrix, the tensor that the loss is
            computed from, such as logits. By default the model's method ``analysis_outputs(batch)``, or the logits of a
            Hugging Face model.
        output_loss: ``output_loss(outputs, batch) -> scalar``, the loss of these outputs, which must equal ``loss_fn``.
            By default the model's method ``analysis_output_loss(outputs, batch)``, or the loss function of a Hugging
            Face model.
        params: The parameters :math:`\theta`: tensors, or names of parameters or modules such as ``["head"]``; by
            default all that require a gradient. Layers before them are evaluated once.
        num_eigenvalues: Number of eigenvalues. Papers on sharpness report the five largest.
        which: "largest" for the algebraically largest ones, or "magnitude" for those of largest magnitude, in
            descending order of it. The second takes a further iteration at the lower end of the spectrum, with
            ``max_steps`` and ``basis_memory`` of its own, and ``eigenvalues_converged`` then covers both ends.
        tolerance: Largest relative residual :math:`\|Hv - \lambda v\| / |\lambda|` of these. 1e-3 makes the error of a
            separated eigenvalue about 1e-6, well below the effect of the choice of samples. Also the largest relative
            difference between products by differences of gradients with two steps.
        trace_tolerance: Standard error of the trace, as a fraction of the larger of :math:`|\operatorname{tr} H|` and
            :math:`\|H\|_F`. The number of probes grows as its inverse square. With 5 %, the minimum number of
            probes often reaches 1 to 2 %.
        max_steps: Maximum number of Lanczos steps.
        max_probes: Maximum number of rounds of probes for the trace, each the cost of one product. A single batch
            needs 16 before its standard error is trusted.
        density: Also compute the density, which takes 16 to 40 Lanczos steps: until the last ones change it less than
            another random start would.
        blocks: Names of parameters or modules by block. By default backbone, router and experts of a model with one of
            our routers, otherwise one block for each child.
        block_eigenvalues: Also compute the largest eigenvalue of each block's diagonal block, for about twenty products
            each.
        keep_eigenvectors: Keep the eigenvectors (``num_eigenvalues`` times the memory of the parameters).
        routing_steps: Lengths of steps along the first eigenvector, in both directions, at which the routing of a
            sparse head is compared (`routing_response`). Models without a sparse router ignore it.
        perturbation: Also compute the adaptive and SAM-type sharpness of `perturbation_sharpness`, for about forty
            gradients.
        start: Start vector (P,), such as the sum of the eigenvectors of the previous epoch. It saves products, but
            excludes the density.
        seed: Seed of all random vectors; equal seeds give equal results.
        graph_memory: Bytes that may be kept between products. The default is 4 GiB on a CPU, limited to half of the
            free memory, and half of the free memory on a GPU. 0 rebuilds the graph of the gradient in every product.
        basis_memory: Bytes for the vectors of the Krylov space, at least ``num_eigenvalues`` + 3 of them. The default
            is 2.5 GiB on a CPU and a quarter of the free memory on a GPU. A smaller basis needs more steps.
        progress: Shows the progress and ends the analysis at its time limit; see `Progress`.
        ranks: The processes that share the work, each with its part of the samples in ``batches``. All of them call
            this function and get the result. By default this process has all samples, or the processes of the mesh
            share a sharded model.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default inferred from its tensors.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of its loss, where that is no mean over the samples; by
            default the number of samples.
        trace: Also compute the trace and the traces of the blocks, with random probes. Without it, no probe is spent,
            and ``converged`` covers the eigenvalues alone.
        skip_double_check: Reason for which the comparisons with float64 and with finite differences are left out, such
            as "made at step 50". The certificate states it, and assumes a usual size of the rounding errors. By
            default they are made, at the cost of some ten products on a part of the samples.

    Returns:
        The numbers with their uncertainty. Flags mark the numbers that did not reach their tolerance. When the time of
        the progress is over, the result holds the eigenvalues so far, and the trace if it was started, and its
        ``partial`` gives the reason.

    Raises:
        ValueError: If an argument is out of range or unknown, the model has nothing to differentiate, the loss or its
            second derivative is not finite, products by differences of gradients depend on the step, or the loss does
            not define the Gauss-Newton matrix.
        RuntimeError: If a layer has no second derivative, for the Gauss-Newton matrix.

    Source:
        Ghorbani, Krishnan and Xiao, An investigation into neural net optimization via Hessian eigenvalue density, 2019.
        Yao, Gholami, Keutzer and Mahoney, PyHessian: neural networks through the lens of the Hessian, 2020.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> result = sharpness(model, lambda m, batch: m(batch).square().mean(), [x], num_eigenvalues=2)
        >>> [round(value, 4) for value in result.eigenvalues], round(result.trace, 4)
        ([4.0, 1.0], 5.0)
    """
    check_arguments(model=model, loss_fn=loss_fn, seed=seed, progress=progress, ranks=ranks)
    check_arguments(batch_size_fn=batch_size_fn, batch_weight_fn=batch_weight_fn)
    check_sharpness_options(
        num_eigenvalues=num_eigenvalues,
        which=which,
        tolerance=tolerance,
        trace_tolerance=trace_tolerance,
        max_steps=max_steps,
        max_probes=max_probes,
        density=density,
        blocks=blocks,
        block_eigenvalues=block_eigenvalues,
        routing_steps=routing_steps,
        perturbation=perturbation,
        graph_memory=graph_memory,
        basis_memory=basis_memory,
        matrix=matrix,
        outputs_fn=outputs_fn,
        output_loss=output_loss,
        trace=trace,
        skip_double_check=skip_double_check,
    )
    check_flags(keep_eigenvectors=keep_eigenvectors)
    selected = selected_parameters(model, params, allows_shards=True)
    num_parameters = sum(p.numel() for p in selected.values())
    if num_eigenvalues > num_parameters:
        raise ValueError(
            f"num_eigenvalues: expected 1 to {num_parameters}, the number of parameters, got {num_eigenvalues}. Pass"
            f" num_eigenvalues={num_parameters} for all of them."
        )
    if start is not None and density:
        raise ValueError(
            "start: expected None with density=True, got a vector. A density needs a random start: pass density=False."
        )
    slices = slices_of(selected)
    places = places_of(default_blocks(model, slices) if blocks is None else blocks, slices)
    experts = expert_places(model, slices)
    progress, ranks = progress or Progress(), ranks_of(model, ranks)
    check_supplements(model, params, routing_steps=routing_steps, perturbation=perturbation)
    parts = output_loss_of(model, loss_fn, outputs_fn, output_loss) if matrix == "gauss_newton" else None

    def algorithm(operator: WeightedSum) -> SharpnessResult:
        record = SharpnessRecord(
            operator,
            places,
            experts,
            density,
            keep_eigenvectors or bool(routing_steps),
            seed,
            trace_tolerance,
            progress,
            dependence,
            has_trace=trace,
        )

        blocks = _both(places, experts)
        # One stream for all random vectors, because the probes of the trace must not repeat the start vector.
        generator = torch.Generator().manual_seed(seed)
        try:
            record.krylov = krylov = lanczos(
                operator,
                generator=generator,
                num_eigenvalues=num_eigenvalues,
                tolerance=tolerance,
                min_steps=_min_steps(num_parameters, density, max_steps),
                max_steps=max_steps,
                start=start,
                basis_memory=basis_memory,
                has_settled=_has_settled,
                on_step=record.add_krylov,
            )
            if which == "magnitude":
                record.add_lower(
                    lower_end(
                        operator,
                        krylov,
                        generator=generator,
                        max_steps=max_steps,
                        basis_memory=basis_memory,
                        on_step=record.add_lower,
                    )
                )
            below = None if record.lower is None else record.lower.krylov
            unchecked = record.from_krylov()
            record.add_spread()
            if not trace and num_parameters > LEAN_ABOVE:
                krylov = record.condense()
            record.certificate = certified(
                unchecked,
                operator,
                krylov,
                blocks if trace else None,
                seed,
                progress,
                below,
                skipped=skip_double_check,
            )
            if trace:
                record.trace = deflated_trace(
                    operator,
                    krylov,
                    generator=generator,
                    tolerance=trace_tolerance,
                    max_probes=max_probes,
                    blocks=blocks,
                    on_step=record.add_trace,
                )
            for name in places if block_eigenvalues else ():
                record.add_block(name, _largest(operator, places[name], generator, tolerance, max_steps))
        except TimeUp as error:
            if record.krylov is None and operator.interrupted is not None:
                record.add_first_value(operator.interrupted, tolerance)
            result: SharpnessResult = progress.result_in_time(error)
            return result
        found = record.result()
        for sentence in record.certificate.warnings() or found.unconverged_eigenvalues():
            progress.warn(sentence)
        return found

    with ranks.synchronized():
        if ranks.is_rank_zero:  # which holds the vectors
            first, *_ = selected.values()
            check_basis_memory(basis_memory, num_parameters, first.dtype, first.device, num_eigenvalues)
        data = Batches.of(batches, batch_size_fn, batch_weight_fn)
        if parts is not None:
            check_same_loss(model, loss_fn, parts, data, progress if ranks.size == 1 else Progress(), seed)
    if params is not None and is_sharded(model):
        part = gathered(model, [loss_fn], data, params, ranks=ranks, progress=progress, seed=seed)
        model, loss_fn, data, params = part.model, part.quantities[0], part.data, None
    dependence = _cut_dependence(model, loss_fn, data, progress, ranks, seed)
    with analysis_mode(model, seed):
        result = shared_hessian(
            ranks,
            algorithm,
            model,
            parts or loss_fn,
            data,
            params=params,
            matrix=matrix,
            graph_memory=graph_memory,
            progress=progress,
            seed=seed,
            tolerance=tolerance,
        )
    result = supplemented(
        model,
        loss_fn,
        data,
        result,
        params=params,
        routing_steps=routing_steps,
        perturbation=perturbation,
        seed=seed,
        progress=progress,
        ranks=ranks,
    )
    return result if keep_eigenvectors else replace(result, eigenvectors=None)


def _cut_dependence(
    model: nn.Module, loss_fn: LossFn, data: Batches, progress: Progress, ranks: Ranks, seed: int
) -> CutDependence:
    """Return the change of the loss when batches are halved, or the reason if there was no time to measure it."""
    try:
        return check_mean(model, loss_fn, data, progress=progress, ranks=ranks, seed=seed)
    except TimeUp:
        return CutDependence(None, f"{progress.end} before it")


def _min_steps(num_parameters: int, density: bool, max_steps: int) -> int:
    """Return the number of Lanczos steps that the density needs at most."""
    if not density:
        return 0
    return min(num_parameters if num_parameters <= _MAX_EXACT else _DENSITY_STEPS, max_steps)


def _has_settled(krylov: LanczosResult) -> bool:
    """Return whether the density needs no further step. Below `_MAX_EXACT` parameters it takes all of them."""
    return krylov.dim > _MAX_EXACT and krylov.num_steps >= _FEWEST_DENSITY_STEPS and has_settled(krylov)


def _both(places: Places, experts: Places) -> Places:
    """Return blocks and experts in one mapping, under distinct names."""
    blocks = {f"block {name}": place for name, place in places.items()}
    return blocks | {f"expert {name}": place for name, place in experts.items()}


def _largest(
    operator: WeightedSum, places: Sequence[slice], generator: torch.Generator, tolerance: float, max_steps: int
) -> tuple[float, float]:
    """Return the largest eigenvalue of a diagonal block and its residual norm, infinite if a larger one may exist."""
    if not places:
        return 0.0, 0.0
    block = DiagonalBlock(operator, places)
    found = lanczos(block, generator=generator, num_eigenvalues=1, tolerance=tolerance, max_steps=max_steps)
    residual = max(float(found.residual_norms[-1]), found.margin) if found.is_complete else math.inf
    return found.eigenvalues[0], residual
