"""Loss landscape of a trained model: the loss along one direction, or on a plane, of its parameters."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn, leaves_of
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.digest import digest_of, digest_of_code
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.gathered import gathered
from moe_heads.analysis._shared.in_step import in_step, ranks_of, work_in_step
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.parameter_path import ParameterPath, Steps
from moe_heads.analysis._shared.parameters import Selection
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.shards import is_sharded
from moe_heads.analysis.loss_landscape.directions import Direction, steps_of
from moe_heads.analysis.loss_landscape.evaluate import NUM_SUMS, AccuracyFn, PointEvaluator, holds_routing
from moe_heads.analysis.loss_landscape.grid import grid_of
from moe_heads.analysis.loss_landscape.points_file import PointCheckpoint
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult
from moe_heads.analysis.loss_landscape.scan import Scan
from moe_heads.analysis.loss_landscape.trajectory import Trajectory
from moe_heads.analysis.sharpness.hessian.directional import directional_curvatures
from moe_heads.checks import check_at_least, check_flags

__all__ = ["loss_landscape"]

# Reach of the default grids: of the study along a unit vector, and of Li et al. on a filter-normalized plane.
_REACH_1D, _REACH_2D = 0.5, 1.0


def loss_landscape(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    direction1: Direction,
    direction2: Direction | None = None,
    alphas: Sequence[float] | Tensor | None = None,
    betas: Sequence[float] | Tensor | None = None,
    num_points: int = 21,
    params: Selection | None = None,
    accuracy_fn: AccuracyFn | None = None,
    fixed_routing: bool | None = None,
    check_curvatures: bool = False,
    refine: int = 0,
    resume: str | os.PathLike[str] | None = None,
    trajectory: Trajectory | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> LossLandscapeResult:
    r"""Compute the mean loss at :math:`\theta + \alpha d_1`, or at :math:`\theta + \alpha d_1 + \beta d_2`.

    :math:`L(\theta) = \frac{1}{N} \sum_i \ell_i(\theta)` over all samples of ``batches``, in evaluation mode. The
    directions are not normalized here. Pass normalized ones: the unit top eigenvector of `sharpness` for a line,
    `filter_normalized` of two random directions for a plane, or the two directions of a `trajectory_plane`. Losses that
    are nan or inf are kept.

    If the model contains routers of this package, the landscape also reports the fraction of samples routed to
    different experts than at the center, and the loss with the choices of the center (see `moe_heads.fixed_routing`).
    The difference of the two losses is the effect of the jumps of a sparse head. It costs a second pass for the batches
    in which a choice changed, through the modules with a router only.

    Modules before the first moved parameter, such as the backbone below a moved head, are evaluated once for each
    batch. The first points off the center validate that this changes no value. Where loss and accuracy call the model
    on the same inputs, they share one pass.

    The model is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error. A loss that draws
    random torch numbers draws the same ones at every point. Apart from the directions and the state that
    `analysis_mode` holds, no memory of the size of the parameters is used.

    Args:
        model: The model :math:`\theta`.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data. All of it is held on the device of the model. Batches are weighted by their samples.
        direction1: :math:`d_1`, flat, (P,), over the parameters that require a gradient in the order of
            ``model.named_parameters()``. Or a state dict, such as another checkpoint: its weights and buffers are
            reached bit for bit at :math:`\alpha = 1`.
        direction2: :math:`d_2`, of the same form, for a plane.
        alphas: Coordinates along the first direction, increasing. Defaults to ``num_points`` equidistant ones in
            [-0.5, 0.5] for a line and in [-1, 1] for a plane. A coordinate that differs from zero only by rounding
            becomes zero.
        betas: Coordinates along the second direction, with the same default as ``alphas``.
        num_points: Number of coordinates if they are not given. An odd number includes the center. Defaults to 21 as in
            the study.
        params: The parameters that the directions are over: tensors, or names of parameters or modules such as
            ``["head"]``. By default all that require a gradient. The others do not move.
        accuracy_fn: ``accuracy_fn(model, batch) -> scalar``, the mean over the samples, also evaluated at every point.
        fixed_routing: Whether to measure the loss at fixed routing. By default it is measured if every sparse router in
            the model defines `Router.rechosen`.
        check_curvatures: Compare the curvature of the slice along each flat direction with :math:`d^\top H d`: one
            Hessian-vector product and four more points each.
        refine: Number of points to add to a line, one after the other, where linear interpolation misses the loss the
            most.
        resume: File of points. Points are written to it during the analysis, and read from it if it exists. Weights,
            samples and directions have to match bit for bit (store an eigenvector with the file: another process may
            compute one that differs by rounding). Loss and accuracy have to have the same code, comments apart, and
            the same values at the center. With several ranks the file of rank zero is used, and the number of ranks has
            to be the same. By default there is no file.
        trajectory: Training run to draw on the plane, from `trajectory_plane`.
        seed: Seed of the random number generators at every point.
        progress: Shows the points, the center first, and enforces the time limit, see `Progress`.
        ranks: The processes that share the work, each with its part of the samples in ``batches``. All of them call
            this function with the same directions and grids, and get the result. By default this process has all
            samples.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch. By default it is inferred from the
            tensors.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of the loss of a batch, if it is not a mean over the
            samples. Defaults to the number of samples.

    Returns:
        The losses on the grid, with accuracies and routing flips of the same shape. If the time limit ends the
        analysis, the points near the center, marked by ``partial``.

    Raises:
        ValueError: If a direction or grid does not fit, the data is empty, the loss is not a scalar or not finite at
            the center, a router does not support fixed routing, or the file is damaged or belongs to another model,
            data, direction, loss or accuracy. With a checked curvature, also if a layer has no second derivative, and
            the products by differences of gradients depend on the step.

    Source:
        Goodfellow, Vinyals and Saxe, arXiv 1412.6544 (line); Li et al., arXiv 1712.09913 (plane).

    Example:
        >>> import torch
        >>> from moe_heads.analysis import loss_landscape
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> x = torch.ones(4, 1)
        >>> line = loss_landscape(model, lambda m, batch: m(batch).square().mean(), [x],
        ...                       direction1=torch.ones(1), alphas=[-1.0, 0.0, 1.0])
        >>> line.losses, line.curvatures
        (tensor([1., 4., 9.], dtype=torch.float64), (2.0,))
    """
    check_arguments(model=model, loss_fn=loss_fn, accuracy_fn=accuracy_fn, seed=seed, progress=progress, ranks=ranks)
    check_arguments(batch_size_fn=batch_size_fn, batch_weight_fn=batch_weight_fn)
    check_flags(check_curvatures=check_curvatures)
    progress, ranks = progress or Progress(), ranks_of(model, ranks)
    if params is not None and is_sharded(model):
        with ranks.synchronized():
            data = Batches.of(batches, batch_size_fn, batch_weight_fn)
        quantities = [loss_fn] if accuracy_fn is None else [loss_fn, accuracy_fn]
        part = gathered(model, quantities, data, params, ranks=ranks, progress=progress, seed=seed)
        model, batches, params, (loss_fn, *others) = part.model, part.data, None, part.quantities
        accuracy_fn = others[0] if others else None
        batch_size_fn = batch_weight_fn = None
    steps = [steps_of(model, direction1, "direction1", params)]
    if direction2 is not None:
        steps.append(steps_of(model, direction2, "direction2", params))
    axes = _axes(alphas, betas, num_points, is_plane=direction2 is not None)
    _check_refine(refine, is_plane=direction2 is not None)
    if resume is not None and not isinstance(resume, (str, os.PathLike)):
        raise ValueError(f"resume: expected the path of a file, got {resume!r}.")
    if trajectory is not None and not isinstance(trajectory, Trajectory):
        raise ValueError(f"trajectory: expected a Trajectory from trajectory_plane, got {trajectory!r}.")
    holds = holds_routing(model, fixed_routing)
    with ranks.synchronized():
        data = Batches.of(batches, batch_size_fn, batch_weight_fn)
    work_in_step(model, data, ranks)
    check_mean(model, loss_fn, data, progress=progress, ranks=ranks, seed=seed)
    with analysis_mode(model, seed) as original:
        checkpoint = None
        if resume is not None:
            functions = {"loss_fn": loss_fn, "accuracy_fn": accuracy_fn}
            checkpoint = _checkpoint(resume, model, data, steps, functions, [holds, seed], ranks)
        exact: dict[int, float] = {}
        if check_curvatures:
            flat = {dim: one for dim, one in enumerate((direction1, direction2)) if isinstance(one, Tensor)}
            curvatures = directional_curvatures(
                model, loss_fn, data, [*flat.values()], params=params, seed=seed, progress=progress, ranks=ranks
            )
            exact = dict(zip(flat, curvatures, strict=True))
        watched = in_step(model, progress, ranks, alone=progress if ranks.is_rank_zero else Progress())
        with ranks.synchronized():
            microbatches = Microbatches(data, device_of(model), watched)
            path = ParameterPath(model, steps, original)
            evaluator = PointEvaluator(model, path, loss_fn, accuracy_fn, microbatches, hold_routing=holds, seed=seed)
        place = torch.zeros(len(axes), dtype=torch.float64, device=ranks.device)

        def algorithm(total: Callable[[Tensor], Tensor]) -> LossLandscapeResult:
            scan = Scan(
                axes,
                lambda point: total(point.to(ranks.device)),
                evaluator,
                path.norms,
                has_accuracy=accuracy_fn is not None,
                seed=seed,
                progress=progress,
                checkpoint=checkpoint,
                trajectory=trajectory,
            )
            return scan.run(exact, refine)

        return ranks.run_with_sums(
            lambda point: evaluator.evaluate(point.tolist()).to(ranks.device),
            algorithm,
            place,
            place.new_zeros(NUM_SUMS),
        )


def _axes(
    alphas: Sequence[float] | Tensor | None,
    betas: Sequence[float] | Tensor | None,
    num_points: int,
    *,
    is_plane: bool,
) -> list[Tensor]:
    if betas is not None and not is_plane:
        raise ValueError("betas: expected None without direction2, got coordinates. Pass direction2 for a plane.")
    check_at_least(2, num_points=num_points)
    reach = _REACH_2D if is_plane else _REACH_1D
    axes = [grid_of("alphas", alphas, reach, num_points)]
    return [*axes, grid_of("betas", betas, reach, num_points)] if is_plane else axes


def _check_refine(refine: int, *, is_plane: bool) -> None:
    check_at_least(0, refine=refine)
    if refine and is_plane:
        raise ValueError(f"refine: expected 0 for a plane, got {refine!r}. Only a line can be refined.")


def _checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    data: Batches,
    steps: Sequence[Steps],
    functions: Mapping[str, Callable[..., Tensor] | None],
    options: Sequence[bool | int],
    ranks: Ranks,
) -> PointCheckpoint:
    # each rank has its own samples
    samples = ranks.gather(digest_of([*(leaf for batch in data for leaf in leaves_of(batch)), data.weights]))
    directions: list[Any] = [
        part for one in steps for name, step in one.items() for part in (name, getattr(step, "end", step))
    ]
    weights: list[Any] = [*model.parameters(), *model.buffers()]
    if is_sharded(model):
        # each rank has its own parts
        weights, directions = ranks.gather(digest_of(weights)), ranks.gather(digest_of(directions))
    codes = {name: [digest_of_code(function)] for name, function in functions.items()}
    return PointCheckpoint(
        path, {"weights": weights, "samples": samples, "directions": directions, **codes, "options": options}
    )
