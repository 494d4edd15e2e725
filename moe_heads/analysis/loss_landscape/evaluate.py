"""Loss, accuracy and routing of a model at the points of a parameter path."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.generators import random_states, set_random_states
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.parameter_path import ParameterPath
from moe_heads.analysis._shared.routing_flips import Choices, choices_of, flip_share
from moe_heads.analysis._shared.scalar import checked_scalar
from moe_heads.analysis._shared.shards import is_sharded
from moe_heads.analysis.loss_landscape.cache import OutputCache
from moe_heads.checks import check_flags
from moe_heads.routing import Router, RoutingCollection, collect_routing, fixed_routing

__all__ = ["NUM_SUMS", "AccuracyFn", "Point", "PointEvaluator", "can_hold_routing", "holds_routing", "sparse_routers"]

AccuracyFn = Callable[[nn.Module, Batch], Tensor]
"""``accuracy_fn(model, batch) -> scalar``, the mean over the samples of the batch."""

NUM_SUMS = 8
"""Sums over the samples of a rank: loss and loss at fixed routing, each times its weight; accuracy and flips; routed
samples; weights of the samples that a sparse router ran on, and of all samples; samples."""


@dataclass(frozen=True)
class Point:
    """Means over the samples at one point. Quantities that were not measured or do not exist are nan.

    Attributes:
        loss: Loss at free routing.
        fixed: Loss at the routing of the center.
        accuracy: Accuracy.
        flips: Fraction of samples that are routed to different experts than at the center.
        num_samples: Number of samples.
    """

    loss: float
    fixed: float
    accuracy: float
    flips: float
    num_samples: int

    @classmethod
    def of(cls, sums: Tensor) -> "Point":
        """Return the means from the sums over all samples, (NUM_SUMS,)."""
        loss, fixed, accuracy, flips, num_routed, sparse_weight, weight, num_samples = sums.tolist()
        return cls(
            loss / weight,
            fixed / weight if sparse_weight else math.nan,
            accuracy / num_samples,
            flips / num_routed if num_routed else math.nan,
            round(num_samples),
        )

    @property
    def values(self) -> tuple[float, float, float, float]:
        """Loss, loss at fixed routing, accuracy and flips."""
        return self.loss, self.fixed, self.accuracy, self.flips


@dataclass(frozen=True)
class _Reference:
    """Routing of a batch at the center."""

    choices: Choices
    sparse: Choices
    collection: RoutingCollection | None


class PointEvaluator:
    """Sums of loss, accuracy and routing over the samples of this rank at a point.

    Routing is compared with that of the center. The loss at fixed routing takes a second pass only for batches in which
    a sample changes its experts. For the other batches it equals the loss at free routing, up to the order in which the
    experts of a sample are added.

    Args:
        model: The model.
        path: Moves the model.
        loss_fn: The loss.
        accuracy_fn: The accuracy, or None.
        data: The samples.
        hold_routing: Whether to measure the loss at fixed routing.
        seed: Seed of the random numbers in the first batch, at every point. Each batch has the next seed, and all
            pieces of a batch have the same.
        reuses_outputs: Whether outputs of modules are reused where that changes nothing.
        counts_soft: Whether the largest gate of a soft router counts as its choice. Otherwise only sparse routers have
            choices that can flip.

    Attributes:
        cache: The outputs that are reused.
        dtype: Data type of the moved tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        path: ParameterPath,
        loss_fn: LossFn,
        accuracy_fn: AccuracyFn | None,
        data: Microbatches,
        *,
        hold_routing: bool,
        seed: int,
        reuses_outputs: bool = True,
        counts_soft: bool = True,
    ) -> None:
        self._model, self._path, self._loss_fn = model, path, on_copies(loss_fn)
        self._accuracy_fn = None if accuracy_fn is None else on_copies(accuracy_fn)
        self._data, self._holds, self._seed, self._counts_soft = data, hold_routing, seed, counts_soft
        self._device = device_of(model)
        self._references: list[_Reference] = []
        self._graph = GraphOnDemand(lambda sums: float(sums[0]))
        self.cache = OutputCache(
            model,
            path.moved,
            shares_accuracy=accuracy_fn is not None,
            shares_fixed_routing=hold_routing and bool(sparse_routers(model)),
        )
        # the processes of a sharded model run the same passes, whatever each finds in its samples
        self._is_in_step = is_sharded(model)
        if not reuses_outputs or self._is_in_step:
            self.cache.disable("the model is sharded" if self._is_in_step else "")
        self.dtype = next((tensor.dtype for tensor in path.moved if tensor.is_floating_point()), torch.float32)

    @property
    def is_soft(self) -> bool:
        """True if routers ran at the center and all of them were soft."""
        return any(known.choices for known in self._references) and not any(known.sparse for known in self._references)

    def follow(self, path: ParameterPath, *, is_new: bool) -> None:
        """Evaluate points of another path, which moves the same tensors from the same center.

        Args:
            path: The path.
            is_new: Whether reused outputs have to be validated on it.
        """
        self._path = path
        if is_new:
            self.cache.revalidate()

    def evaluate(self, point: Sequence[float]) -> Tensor:
        """Return the sums at a point, (NUM_SUMS,), float64. The first point has to be the center.

        Raises:
            ValueError: If the loss at the center is not finite, or a loss or accuracy is not a scalar.
        """
        with self.cache.active():
            if not any(point):
                return self._at_center()
            while True:
                if self._is_outdated:
                    self._at_center()
                self._path.go(point)
                rows = self._rows(at_center=False)
                if not self._is_outdated:
                    rows = self.cache.validate(rows, lambda: self._rows(at_center=False))
                if not self._is_outdated:
                    return rows.sum(0)

    @property
    def _is_outdated(self) -> bool:
        """True if batches were halved since their routing was recorded."""
        return len(self._references) != len(self._data)

    def _at_center(self) -> Tensor:
        self._path.go([0.0] * self._path.num_directions)
        self._references = []
        rows = self.cache.record(lambda: self._rows(at_center=True))
        if self._graph.needs_graph:
            self.cache.disable("the loss is evaluated with a graph")
        losses = rows[:, 0].tolist()
        for origin, weight, loss in zip(self._data.origins, self._data.weights, losses, strict=False):
            if not math.isfinite(loss):
                raise ValueError(
                    "loss_fn: expected a finite loss of the given model, got"
                    f" {loss / weight} as the loss of batch {origin}. Check the model and the data."
                )
        return rows.sum(0)

    def _rows(self, *, at_center: bool) -> Tensor:
        """Return the sums of each batch, (batches, NUM_SUMS)."""
        evaluated = self._data.evaluate(
            lambda index, batch: self._graph(
                lambda: self._of_batch(index, batch, at_center=at_center), compares=at_center and not self._is_in_step
            ),
            copies=False,
        )
        rows = [sums for _, sums in evaluated]
        return torch.stack(rows) if rows else torch.zeros(1, NUM_SUMS, dtype=torch.float64)

    def _of_batch(self, index: int, batch: Batch, *, at_center: bool) -> Tensor:
        if not at_center and self._is_outdated:
            return torch.zeros(NUM_SUMS, dtype=torch.float64)  # a batch was just halved: the point is evaluated again
        self.cache.begin(index, records=at_center)
        torch.manual_seed(self._seed + self._data.origins[index])  # the numbers that the loss draws in the Hessian
        start = random_states(self._device)
        with self.cache.loss_pass():
            loss, routing = self._loss(index, batch)
        accuracy = self._accuracy(index, batch)
        sparse = _sparse(routing)
        here = _Reference(choices_of(routing if self._counts_soft else sparse), choices_of(sparse), None)
        if at_center:
            known = routing if self._holds and here.sparse else None
            # replaces what a failed evaluation of this batch recorded
            self._references[index:] = [_Reference(here.choices, here.sparse, known)]
        reference = self._references[index]
        flips, fixed = flip_share(here.choices, reference.choices), loss
        has_flips = reference.collection is not None and flip_share(here.sparse, reference.sparse) > 0
        if reference.collection is not None and (has_flips or (self._is_in_step and not at_center)):
            end = random_states(self._device)
            set_random_states(self._device, start)  # the random numbers of the loss at free routing
            with fixed_routing(self._model, reference.collection), self.cache.fixed_routing_pass():
                held, _ = self._loss(index, batch)
            fixed = held if has_flips else loss
            set_random_states(self._device, end)
        is_routed, is_sparse = not math.isnan(flips), reference.collection is not None
        means = [loss, fixed, accuracy, flips if is_routed else 0.0, is_routed, is_sparse, 1.0, 1.0]
        size, weight = self._data.sizes[index], self._data.weights[index]
        factors = [weight, weight, size, size, size, weight, weight, size]
        return torch.tensor(factors, dtype=torch.float64) * torch.tensor(means, dtype=torch.float64)

    def _loss(self, index: int, batch: Batch) -> tuple[float, RoutingCollection]:
        with collect_routing(self._model) as routing:
            loss = self._loss_fn(self._model, batch)
        # detached: a graph would stay in memory while the next one is built
        return _scalar(loss, self._data.origins[index], "loss_fn"), _detached(routing)

    def _accuracy(self, index: int, batch: Batch) -> float:
        if self._accuracy_fn is None:
            return math.nan
        with self.cache.accuracy_pass():
            accuracy = self._accuracy_fn(self._model, batch)
        return _scalar(accuracy, self._data.origins[index], "accuracy_fn")


def can_hold_routing(model: nn.Module) -> bool:
    """Return whether every sparse router in the model defines `Router.rechosen`."""
    return all(type(router).rechosen is not Router.rechosen for router in sparse_routers(model))


def holds_routing(model: nn.Module, fixed_routing: bool | None) -> bool:
    """Return whether to measure the loss at fixed routing, by default if all routers support it.

    Raises:
        ValueError: If ``fixed_routing`` is neither a bool nor None, or True for a router that does not support it.
    """
    can_hold = can_hold_routing(model)
    if fixed_routing is None:
        return can_hold
    check_flags(fixed_routing=fixed_routing)
    if fixed_routing and not can_hold:
        raise ValueError(
            "fixed_routing: expected False for a model with a sparse router that does not define rechosen(routing,"
            " reference), got True. Define it in the router class, or pass False."
        )
    return fixed_routing


def sparse_routers(model: nn.Module) -> list[Router]:
    """Return the routers in the model that choose experts, as their attribute ``k`` states."""
    return [module for module in model.modules() if isinstance(module, Router) and module.k is not None]


def _sparse(collection: RoutingCollection) -> RoutingCollection:
    """Return the passes of sparse routers: the largest gate of a soft router decides nothing."""
    sparse = RoutingCollection()
    for name, routings in collection.routings.items():
        sparse.routings[name] = [routing for routing in routings if not routing.soft]
    return sparse


def _detached(collection: RoutingCollection) -> RoutingCollection:
    detached = RoutingCollection()
    for name, routings in collection.routings.items():
        detached.routings[name] = [routing.detach() for routing in routings]
    return detached


def _scalar(value: object, batch: int, name: str) -> float:
    return float(checked_scalar(value, f"the mean over the samples of batch {batch}", name).detach())
