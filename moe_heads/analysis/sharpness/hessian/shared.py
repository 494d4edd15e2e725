"""The Hessian over the samples of several processes."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.gathered import gathered
from moe_heads.analysis._shared.in_step import in_step, work_in_step
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.shards import REMEDY, is_sharded
from moe_heads.analysis.sharpness.hessian.loss_graph import NoSecondDerivative
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.parameters import Selection
from moe_heads.analysis.sharpness.hessian.products import GraphMode, Matrix
from moe_heads.analysis.sharpness.hessian.sharded_differences import ShardedDifferences
from moe_heads.analysis.sharpness.hessian.weighted_sum import WeightedSum
from moe_heads.analysis.sharpness.hessian.whole_differences import WholeDifferences

__all__ = ["shared_hessian"]

T = TypeVar("T")


def shared_hessian(
    ranks: Ranks,
    algorithm: Callable[[WeightedSum], T],
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    params: Selection | None = None,
    matrix: Matrix = "hessian",
    graph_memory: int | None = None,
    mode: GraphMode | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
    tolerance: float = 1e-2,
) -> T:
    """Run ``algorithm(operator)`` on rank zero, with the Hessian of the mean loss over the samples of all ranks.

    For all parameters of a sharded model, the products are differences of gradients. Parameters that are named in
    ``params`` are gathered instead. Rank zero holds whole vectors in both cases. If a layer has no second derivative,
    the products are differences of gradients too, and ``algorithm`` starts a second time with them.

    Args:
        ranks: The processes.
        algorithm: Run on rank zero alone.
        model: The model, the same on all ranks.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batches: The samples of this rank.
        params: See `HessianOperator`.
        matrix: See `HessianOperator`; "hessian" for a sharded model.
        graph_memory: See `HessianOperator`.
        mode: See `HessianOperator`.
        progress: See `HessianOperator`.
        seed: See `HessianOperator`.
        batch_size_fn: See `HessianOperator`.
        batch_weight_fn: See `HessianOperator`.
        tolerance: Largest relative difference between products by differences of gradients with two steps; see
            `GradientDifferences`.

    Returns:
        What ``algorithm`` returned, on every rank.
    """
    if is_sharded(model):
        with ranks.synchronized():
            data = Batches.of(batches, batch_size_fn, batch_weight_fn)
        progress = progress or Progress()
        if params is None:
            operator: WeightedSum = _by_differences(model, loss_fn, data, ranks, progress, seed, tolerance)
            return _run(ranks, algorithm, operator)
        part = gathered(model, [loss_fn], data, params, ranks=ranks, progress=progress, seed=seed)
        with analysis_mode(part.model, seed):
            return shared_hessian(
                ranks,
                algorithm,
                part.model,
                part.quantities[0],
                part.data,
                graph_memory=graph_memory,
                mode=mode,
                progress=progress,
                seed=seed,
            )
    with ranks.synchronized():
        data = Batches.of(batches, batch_size_fn, batch_weight_fn)
    # only rank zero checks the time
    watched = progress if ranks.is_rank_zero else None
    cause = ""
    with ranks.synchronized():
        try:
            operator = HessianOperator(
                model,
                loss_fn,
                data,
                params,
                matrix=matrix,
                graph_memory=graph_memory,
                mode=mode,
                progress=watched,
                seed=seed,
            )
            if ranks.size > 1:
                # afterwards only rank zero could change to differences
                operator.check_second_derivative()
        except NoSecondDerivative as error:
            if matrix == "gauss_newton":
                raise  # differences of gradients are products with the Hessian
            cause = str(error)
    cause = next(filter(None, ranks.gather(cause)), "")
    if not cause:
        try:
            return _run(ranks, algorithm, operator)
        except NoSecondDerivative as error:
            if ranks.size > 1 or matrix == "gauss_newton":
                raise
            cause = str(error)
    with ranks.synchronized():
        own = Microbatches(data, device_of(model), watched or Progress())
        differences = WholeDifferences(model, loss_fn, own, params, tolerance=tolerance, seed=seed, cause=cause)
    return _run(ranks, algorithm, differences)


def _by_differences(
    model: nn.Module,
    loss_fn: LossFn,
    data: Batches,
    ranks: Ranks,
    progress: Progress,
    seed: int,
    tolerance: float,
) -> ShardedDifferences:
    work_in_step(model, data, ranks)
    with ranks.synchronized():
        batches = Microbatches(data, device_of(model), in_step(model, progress, ranks))
        return ShardedDifferences(
            model, loss_fn, batches, tolerance=tolerance, seed=seed, remedy=f"{REMEDY}, or raise the tolerance."
        )


def _run(ranks: Ranks, algorithm: Callable[[WeightedSum], T], operator: WeightedSum) -> T:
    try:
        if ranks.size == 1:
            return algorithm(operator)
        return _run_with_sums(ranks, algorithm, operator)
    finally:
        operator.release()  # a result that refers to the operator must not keep the graphs


def _run_with_sums(ranks: Ranks, algorithm: Callable[[WeightedSum], T], operator: WeightedSum) -> T:
    num_samples = ranks.sum(operator.num_samples)
    gathered = ranks.gather(operator.own_stratum_weights())
    # A rank without samples of the last batch, which may be too small to cut, adds nothing to its stratum.
    weights = torch.zeros(max(map(len, gathered)), dtype=torch.float64)
    for own in gathered:
        weights[: len(own)] += own
    operator.over_ranks(None, num_samples=num_samples, stratum_weights=weights)

    def evaluate(message: Tensor) -> Tensor:
        stratum = int(message[-1])
        return operator.sample_sum(message[:-1], None if stratum < 0 else stratum)

    def with_total(total: Callable[[Tensor], Tensor]) -> T:
        def of_all(vector: Tensor, stratum: int | None) -> Tensor:
            return total(torch.cat([vector, vector.new_tensor([-1.0 if stratum is None else stratum])]))

        operator.over_ranks(of_all, num_samples=num_samples, stratum_weights=weights)
        return algorithm(operator)

    vector = torch.zeros(operator.num_parameters, dtype=operator.dtype, device=operator.device)
    return ranks.run_with_sums(
        evaluate, with_total, torch.cat([vector, vector[:1]]), torch.cat([vector, weights.to(vector), vector[:1]])
    )
