"""How the routing of a sparse head answers to a step of the parameters, and what that does to the loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.parameter_path import ParameterPath
from moe_heads.analysis._shared.preserve import analysis_mode
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.routing_flips import Choices, choices_of, flip_share
from moe_heads.analysis.loss_landscape.directions import split_direction
from moe_heads.analysis.loss_landscape.routing_response_result import RoutingResponse
from moe_heads.routing import Router, RoutingCollection, collect_routing, fixed_routing

__all__ = ["has_sparse_router", "routing_response"]

T = TypeVar("T")

# Weighted free and fixed loss, flips, samples that were routed, sum of the weights, number of samples.
_NUM_SUMS = 6


def has_sparse_router(model: nn.Module) -> bool:
    """Whether a router inside ``model`` says by its attribute ``k`` that it chooses: whether the routing can respond.

    Example:
        >>> from moe_heads import SoftMoE, SparseMoE
        >>> from moe_heads.analysis.loss_landscape.routing_response import has_sparse_router
        >>> has_sparse_router(SparseMoE(8, 3)), has_sparse_router(SoftMoE(8, 3))
        (True, False)
    """
    return any(isinstance(module, Router) and module.k is not None for module in model.modules())


def routing_response(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    direction: Tensor,
    steps: Sequence[float] | Tensor,
    *,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    seed: int = 0,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> RoutingResponse:
    r"""Loss at :math:`\theta + s d` with free and with fixed routing, and the share of samples that are routed anew.

    With the choice :math:`I_i(\theta)` of the experts for sample i, in evaluation mode,

    .. math::
        L_\text{free}(s) &= \frac{1}{N} \sum_i \ell_i\big(\theta + s d, I_i(\theta + s d)\big), \\
        L_\text{fixed}(s) &= \frac{1}{N} \sum_i \ell_i\big(\theta + s d, I_i(\theta)\big), \\
        \text{flips}(s) &= \frac{1}{N} \sum_i 1\big[I_i(\theta + s d) \ne I_i(\theta)\big].

    The first has jumps, the second is as smooth as the model; the derivatives of both at s = 0, the Hessian among them,
    are those of the second. So a Hessian tells about the loss up to the step at which the two part. In the fixed one
    the mixing weights follow the parameters (see `moe_heads.fixed_routing`).

    The model is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error. A loss that draws
    random torch numbers draws the same ones at every point. A step costs two forward passes, one where no sparse
    router runs.

    Args:
        model: The model :math:`\theta`.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data; all of it is held on the device of the model. Batches are weighted by their samples.
        direction: d, flat, (P,), over the parameters that require a gradient in the order of
            ``model.named_parameters()``; used as it is given.
        steps: s, distinct, of any signs; with s and -s there are second differences. The smallest are measured first.
        progress: Shows the steps, the center first, and ends the analysis when its time is over; see `Progress`.
        ranks: The processes that share the work, each with its part of the samples in ``batches``; all of them call
            this function with the same direction and steps, and get the result. By default this process has all
            samples.
        seed: Seed of the random number generators at every point.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default its tensors tell.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of its loss, where that is no mean over the samples; by
            default the number of samples.

    Returns:
        Losses and flips of each step. A loss that is nan or inf at a step stays so. Without a sparse router those with
        fixed routing and the flips are None. When the time of the progress is over, the steps that were measured,
        marked by ``partial``.

    Raises:
        ValueError: If the direction or the steps do not fit, the data is empty, the loss is not a scalar or not finite
            for the model as it is, a router does not define `Router.rechosen`, or the routers see other rows at a step.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> from moe_heads.analysis import random_direction
        >>> from moe_heads.analysis.loss_landscape.routing_response import routing_response
        >>> head = SparseMoE(8, 3, num_experts=4, k=1)
        >>> batch = torch.randn(50, 8), torch.randint(3, (50,))
        >>> loss_fn = lambda m, batch: torch.nn.functional.cross_entropy(m(batch[0]), batch[1])
        >>> response = routing_response(head, loss_fn, [batch], random_direction(head), [-1.0, 1e-9, 1.0])
        >>> response.flips[0] > 0, response.flips[1]
        (True, 0.0)
        >>> response.losses_free[0] == response.losses_fixed[0], response.losses_free[1] == response.losses_fixed[1]
        (False, True)
    """
    parts = split_direction(model, direction)
    asked = _checked_steps(steps)
    progress, ranks = progress or Progress(), ranks or Ranks()
    with ranks.synchronized():
        given = Batches.of(batches, batch_size_fn, batch_weight_fn)
    check_mean(model, loss_fn, given, progress=progress, ranks=ranks, seed=seed)
    with analysis_mode(model, seed):
        with ranks.synchronized():
            # with several processes a clock inside an evaluation would part their ways: rank zero looks between them
            data = Microbatches(given, device_of(model), progress if ranks.size == 1 else Progress())
            survey = _Survey(model, ParameterPath(model, [parts]), loss_fn, data, seed)
        step = torch.zeros(1, dtype=torch.float64, device=ranks.device)
        return ranks.run_with_sums(
            lambda s: survey.measure(s.item()).to(ranks.device),
            lambda total: _algorithm(total, asked, step, progress, seed),
            step,
            step.new_zeros(_NUM_SUMS),
        )


def _checked_steps(steps: Sequence[float] | Tensor) -> list[float]:
    given = torch.as_tensor(steps, dtype=torch.float64, device="cpu")
    numbers: list[float] = given.reshape(-1).tolist()
    distinct = len(set(numbers)) == len(numbers)
    if given.dim() != 1 or not numbers or not all(map(math.isfinite, numbers)) or not distinct:
        raise ValueError(f"steps: expected at least one number, finite and distinct, got {given.tolist()}")
    return numbers


def _algorithm(
    total: Callable[[Tensor], Tensor], steps: list[float], message: Tensor, progress: Progress, seed: int
) -> RoutingResponse:
    """Measure the center, then the steps from it outwards."""
    center = _Point.of(total(message))
    found = {0.0: center} if 0 in steps else {}
    remaining = sorted(set(steps) - set(found), key=abs)

    def result(partial: str = "") -> RoutingResponse:
        measured = [step for step in steps if step in found]
        points = [found[step] for step in measured]
        return RoutingResponse(
            steps=tuple(measured),
            losses_free=tuple(point.free for point in points),
            losses_fixed=tuple(point.fixed for point in points) if center.is_routed else None,
            flips=tuple(point.flips for point in points) if center.is_routed else None,
            center_loss=center.free,
            num_samples=center.num_samples,
            seed=seed,
            num_unmeasured=len(steps) - len(measured),
            partial=partial,
        )

    try:
        progress.step(1, 1 + len(remaining))
        for done, step in enumerate(remaining, start=2):
            found[step] = _Point.of(total(torch.full_like(message, step)))
            progress.keep(result)
            progress.step(done, 1 + len(remaining))
    except TimeUp as error:
        in_time: RoutingResponse = progress.result_in_time(error)
        return in_time
    return result()


@dataclass(frozen=True)
class _Point:
    """Means over the samples at one point."""

    free: float
    fixed: float
    flips: float
    num_samples: int

    @classmethod
    def of(cls, sums: Tensor) -> "_Point":
        free, fixed, flips, num_routed, weight, num_samples = sums.tolist()
        share = flips / num_routed if num_routed else math.nan
        return cls(free / weight, fixed / weight, share, round(num_samples))

    @property
    def is_routed(self) -> bool:
        return not math.isnan(self.flips)


class _Survey:
    """This rank's part of the losses and flips at a step."""

    def __init__(self, model: nn.Module, walk: ParameterPath, loss_fn: LossFn, data: Microbatches, seed: int) -> None:
        self._model, self._walk, self._loss_fn, self._data = model, walk, on_copies(loss_fn), data
        self._seed = seed
        self._references: list[RoutingCollection] = []
        self._graph = GraphOnDemand(lambda found: float(found[0]))

    def measure(self, step: float) -> Tensor:
        """Return the sums over the samples, (_NUM_SUMS,), float64."""
        if step == 0:
            return self._record()
        while True:
            if self._is_outdated:
                self._record()
            self._walk.go([step])
            total = torch.zeros(_NUM_SUMS, dtype=torch.float64)
            for _, sums in self._evaluated(self._compare):
                total += sums
            if not self._is_outdated:
                return total

    @property
    def _is_outdated(self) -> bool:
        """Whether batches were cut since their routing was recorded, so that the records fit them no longer."""
        return len(self._references) != len(self._data)

    def _record(self) -> Tensor:
        """The sums for the model as it is, whose routing is kept."""
        self._walk.go([0.0])
        self._references, total = [], torch.zeros(_NUM_SUMS, dtype=torch.float64)
        for index, (_, (loss, reference)) in enumerate(self._evaluated(self._at_center, compares=True)):
            self._references.append(reference)
            total += self._sums(index, loss, loss, 0, bool(_choices(reference)))
        return total

    def _evaluated(self, function: Callable[[int, Batch], T], *, compares: bool = False) -> Iterator[tuple[float, T]]:
        """``function(index, batch)`` for each batch."""
        return self._data.evaluate(
            lambda index, batch: self._graph(lambda: function(index, batch), compares=compares), copies=False
        )

    def _at_center(self, index: int, batch: Batch) -> tuple[float, RoutingCollection]:
        loss, collection = self._free(index, batch)
        if not math.isfinite(loss):
            raise ValueError(
                f"loss_fn: expected a finite loss of the model as it is, got {loss} as the loss of batch {index}"
            )
        return loss, collection

    def _compare(self, index: int, batch: Batch) -> Tensor:
        """Return the sums of one batch."""
        if self._is_outdated:
            return torch.zeros(_NUM_SUMS)  # cut a moment ago: all is measured again
        free, collection = self._free(index, batch)
        reference = self._references[index]
        chosen = _choices(reference)
        if not chosen:
            return self._sums(index, free, free, 0, False)
        with fixed_routing(self._model, reference):
            fixed = self._loss(index, batch)
        return self._sums(index, free, fixed, flip_share(_choices(collection), chosen), True)

    def _sums(self, index: int, free: float, fixed: float, flips: float, is_routed: bool) -> Tensor:
        weight, size = self._data.weights[index], self._data.sizes[index]
        sums = [weight * free, weight * fixed, size * flips, size * is_routed, weight, size]
        return torch.tensor(sums, dtype=torch.float64)

    def _free(self, index: int, batch: Batch) -> tuple[float, RoutingCollection]:
        with collect_routing(self._model) as collection:
            loss = self._loss(index, batch)
        # the graph behind it would be in memory while the next one is built
        return loss, _detached(collection)

    def _loss(self, index: int, batch: Batch) -> float:
        # by the batch, not once a sweep: the free and the fixed loss draw the same numbers
        torch.manual_seed(self._seed + self._data.origins[index])
        loss = self._loss_fn(self._model, batch)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return float(loss.detach())
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: expected a scalar tensor, the mean loss of batch {index}, got {got}")


def _detached(collection: RoutingCollection) -> RoutingCollection:
    """What was collected, without the graph behind it."""
    detached = RoutingCollection()
    for name, routings in collection.routings.items():
        detached.routings[name] = [routing.detach() for routing in routings]
    return detached


def _choices(collection: RoutingCollection) -> Choices:
    """Choices of the sparse routers' passes: the largest gate of a soft one decides nothing."""
    sparse = RoutingCollection()
    for name, routings in collection.routings.items():
        sparse.routings[name] = [routing for routing in routings if not routing.soft]
    return choices_of(sparse)
