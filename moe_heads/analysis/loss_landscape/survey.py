"""Measure loss, accuracy and routing of a model where a walk has brought it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.parameter_path import ParameterPath
from moe_heads.analysis._shared.random_states import random_states, set_random_states
from moe_heads.analysis._shared.routing_flips import Choices, choices_of, flip_share
from moe_heads.analysis.loss_landscape.features import Features
from moe_heads.analysis.loss_landscape.point import NUM_SUMS, sums_of
from moe_heads.analysis.loss_landscape.repeats import Repeats
from moe_heads.analysis.loss_landscape.saving import OTHER_OUTPUT, Saving, checking
from moe_heads.routing import Router, RoutingCollection, collect_routing, fixed_routing

__all__ = ["AccuracyFn", "Survey", "can_hold_routing"]

AccuracyFn = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class _Reference:
    """The routing of a batch at the center."""

    choices: Choices
    sparse: Choices
    collection: RoutingCollection | None


class Survey:
    """This rank's sums over the samples at a point of a walk.

    Routing is compared with that at the center. The loss at fixed routing costs a second pass only for batches in which
    a sample chose other experts, and of these only what comes behind the routers: for the others it is the loss as it
    is, up to the order in which a sample's experts are added.

    Args:
        model: The model.
        walk: Moves it.
        loss_fn: The loss.
        accuracy_fn: The accuracy; None for none.
        data: The samples.
        hold_routing: Whether to measure the loss at fixed routing.
        seed: Seed of the random numbers in the first batch, at every point; each batch has the next, all pieces of a
            batch the same.

    Attributes:
        features: What is computed once.
        dtype: Data type of what moves.
    """

    def __init__(
        self,
        model: nn.Module,
        walk: ParameterPath,
        loss_fn: LossFn,
        accuracy_fn: AccuracyFn | None,
        data: Microbatches,
        *,
        hold_routing: bool,
        seed: int,
    ) -> None:
        self._model, self._walk, self._loss_fn = model, walk, on_copies(loss_fn)
        self._accuracy_fn = None if accuracy_fn is None else on_copies(accuracy_fn)
        self._data, self._holds, self._seed = data, hold_routing, seed
        self._references: list[_Reference] = []
        self._graph = GraphOnDemand(lambda sums: float(sums[0]))
        self._for_accuracy = Repeats.of_all(model) if accuracy_fn is not None else Repeats(model, ())
        self._for_fixed = (
            Repeats.without_routers(model) if hold_routing and _sparse_routers(model) else Repeats(model, ())
        )
        self.features = Features(model, walk.moved)
        self._savings: tuple[Saving, ...] = (self.features, self._for_accuracy, self._for_fixed)
        self.dtype = next((tensor.dtype for tensor in walk.moved if tensor.is_floating_point()), torch.float32)

    @property
    def saves(self) -> bool:
        """Whether anything is to be computed once instead of anew."""
        return any(saving.is_on for saving in self._savings)

    @property
    def not_shared(self) -> str:
        """Why accuracy or the loss at fixed routing have passes of their own; "" where nothing spoke against it."""
        named = {"accuracy": self._for_accuracy.reason, "fixed routing": self._for_fixed.reason}
        return "; ".join(f"{name}: {reason}" for name, reason in named.items() if reason)

    @property
    def is_soft(self) -> bool:
        """Whether routers ran at the center and none of them chose."""
        return any(known.choices for known in self._references) and not any(known.sparse for known in self._references)

    def turn_to(self, walk: ParameterPath, *, is_new: bool) -> None:
        """Go along another walk, which moves the same tensors, from the same center.

        Args:
            walk: The walk.
            is_new: Whether what is saved has to be proved there.
        """
        self._walk = walk
        if is_new:
            for saving in self._savings:
                saving.doubt()

    def measure(self, point: Sequence[float]) -> Tensor:
        """The sums at a point, (NUM_SUMS,), float64, see `point`; the center has to be the first."""
        with self.features.active(), self._for_accuracy.active(), self._for_fixed.active():
            if not any(point):
                return self._record()
            while True:
                if self._is_outdated:
                    self._record()
                self._walk.go(point)
                rows = self._proved(self._rows(records=False))
                if not self._is_outdated:
                    return rows.sum(0)

    @property
    def _is_outdated(self) -> bool:
        """Whether batches were cut since their routing was recorded, so that the records fit them no longer."""
        return len(self._references) != len(self._data)

    def _record(self) -> Tensor:
        self._walk.go([0.0] * self._walk.num_directions)
        self._references = []
        self.features.forget()
        # the center is no less than a proof: its accuracy is that of a pass of its own
        with checking(self._savings):
            rows = self._rows(records=True)
        if self._for_accuracy.has_doubt:
            self._for_accuracy.give_up(OTHER_OUTPUT)
        if self._graph.needs_graph:
            for saving in self._savings:
                if saving.is_on:
                    saving.give_up("the loss is evaluated with a graph")
        return rows.sum(0)

    def _proved(self, found: Tensor) -> Tensor:
        """The sums of each batch, by plain passes where what was replayed is still to be compared with them."""
        if self._is_outdated or not any(saving.needs_proof for saving in self._savings):
            return found
        used = [saving for saving in self._savings if saving.is_on and saving.was_used]
        # the plain passes last: they may leave behind what replayed ones should have changed
        with checking(self._savings):
            plain = self._rows(records=False)
        if not self._is_outdated:
            self._judge(used, same=torch.allclose(found, plain, rtol=0, atol=0, equal_nan=True))
        return plain

    def _judge(self, used: Sequence[Saving], *, same: bool) -> None:
        """Give up what was found out; where nothing was and the numbers differ all the same, whatever was used."""
        guilty = [saving for saving in used if saving.has_doubt]
        for saving in used:
            if saving.has_doubt:
                saving.give_up(OTHER_OUTPUT)
            elif not same and not guilty:
                what = "kept features" if saving is self.features else "a shared pass"
                saving.give_up(f"the loss was another one with {what} than without")
            elif same:
                saving.prove()

    def _rows(self, *, records: bool) -> Tensor:
        """The sums of each batch, (batches, NUM_SUMS)."""
        evaluated = self._data.evaluate(
            lambda index, batch: self._graph(lambda: self._of_batch(index, batch, records=records), compares=records),
            copies=False,
        )
        rows = [sums for _, sums in evaluated]
        return torch.stack(rows) if rows else torch.zeros(1, NUM_SUMS, dtype=torch.float64)

    def _of_batch(self, index: int, batch: Batch, *, records: bool) -> Tensor:
        if not records and self._is_outdated:
            return torch.zeros(NUM_SUMS, dtype=torch.float64)  # cut a moment ago: all is measured again
        self.features.begin(index, records=records)
        torch.manual_seed(self._seed + self._data.origins[index])  # the numbers that the loss draws in the Hessian
        device = self.features.device
        start = random_states(device)
        with self._for_accuracy.recorded(), self._for_fixed.recorded():
            loss, routing = self._loss(batch)
        accuracy = self._accuracy(batch)
        here = _Reference(choices_of(routing), choices_of(_sparse(routing)), None)
        if records:
            held = _detached(routing) if self._holds and here.sparse else None
            # in place of one that was recorded before it failed for want of memory or of a graph
            self._references[index:] = [_Reference(here.choices, here.sparse, held)]
        there = self._references[index]
        flips = flip_share(here.choices, there.choices)
        fixed = loss
        if there.collection is not None and flip_share(here.sparse, there.sparse) > 0:
            end = random_states(device)
            set_random_states(device, start)  # the numbers of the loss at free routing
            with fixed_routing(self._model, there.collection), self._for_fixed.replayed():
                fixed, _ = self._loss(batch)
            set_random_states(device, end)
        sparse = there.collection is not None
        size, weight = self._data.sizes[index], self._data.weights[index]
        return sums_of(size, weight, loss, fixed, accuracy, flips, is_routed=not math.isnan(flips), is_sparse=sparse)

    def _loss(self, batch: Batch) -> tuple[float, RoutingCollection]:
        with collect_routing(self._model) as routing:
            return _scalar("loss_fn", self._loss_fn(self._model, batch)), routing

    def _accuracy(self, batch: Batch) -> float:
        if self._accuracy_fn is None:
            return math.nan
        with self._for_accuracy.replayed():
            return _scalar("accuracy_fn", self._accuracy_fn(self._model, batch))


def can_hold_routing(model: nn.Module) -> bool:
    """Whether every sparse router in the model says how it weighs the choices of another one."""
    return all(type(router).rechosen is not Router.rechosen for router in _sparse_routers(model))


def _sparse_routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router) and module.k is not None]


def _sparse(collection: RoutingCollection) -> RoutingCollection:
    """The passes that chose: the largest gate of a soft router decides nothing."""
    sparse = RoutingCollection()
    for name, routings in collection.routings.items():
        sparse.routings[name] = [routing for routing in routings if not routing.soft]
    return sparse


def _detached(collection: RoutingCollection) -> RoutingCollection:
    detached = RoutingCollection()
    for name, routings in collection.routings.items():
        detached.routings[name] = [routing.detach() for routing in routings]
    return detached


def _scalar(name: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name}: expected a scalar tensor, the mean over the samples of the batch, got {got}")
