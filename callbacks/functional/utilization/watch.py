"""What the routers of a model do while it trains, at next to no cost for a step.

A batch's decisions are a few numbers a row: they are kept as they are, and counted some hundred thousand numbers at a
time. So a step pays for a few references, and nothing waits for the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.utilization.metric import ExpertUtilizationMetric
from moe_heads.routing import Routing, RoutingCollection

__all__ = ["RouterKind", "RoutingWatch"]

# Numbers of the (N, E) logits after which the decisions that wait are counted: what a cache holds. With a quarter of it
# and with eight times as much a step costs a fifth more.
_MAX_WAITING = 2**17

# A norm costs as much as ten small operations: on every step a twentieth of the training of a head alone.
_STEPS_BETWEEN_NORMS = 20

_COUNTED = ("logits", "probs", "indices", "weights", "rows", "scores", "noisy_logits")


@dataclass(frozen=True)
class RouterKind:
    """What has to be known of a router to count what it does.

    Attributes:
        num_experts: E.
        soft: Whether it mixes all experts.
        device: Where it decides.
    """

    num_experts: int
    soft: bool
    device: str


class RoutingWatch:
    """Utilisation of each router over the training steps of an epoch.

    Attributes:
        kinds: Kind of each router that ran, by name.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, RouterKind] = {}
        self._metrics: dict[str, ExpertUtilizationMetric] = {}
        self._waiting: dict[str, list[Routing]] = {}
        self._num_waiting: dict[str, int] = {}
        self._norms: dict[str, Tensor] = {}
        self._num_norms: dict[str, int] = {}
        self._num_steps: dict[int, int] = {}

    def take(self, collection: RoutingCollection) -> None:
        """Take what was collected of a batch out of the collection."""
        for name, passes in collection.routings.items():
            self._waiting.setdefault(name, []).extend(map(_kept, passes))
            num_waiting = self._num_waiting.get(name, 0) + sum(routing.logits.numel() for routing in passes)
            self._num_waiting[name] = num_waiting
            passes.clear()
            if num_waiting >= _MAX_WAITING:
                self._count(name)

    def note_gradients(self, routers: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Note the norms of the routers' gradients that an optimizer is about to follow, every twentieth time."""
        steps = self._num_steps[id(optimizer)] = self._num_steps.get(id(optimizer), 0) + 1
        if steps % _STEPS_BETWEEN_NORMS != 1:
            return
        its_own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, router in routers.items():
            gradients = [p.grad.detach() for p in router.parameters() if p in its_own and p.grad is not None]
            if gradients:
                norm = torch.nn.utils.get_total_norm(gradients).double()
                self._norms[name] = self._norms[name] + norm if name in self._norms else norm
                self._num_norms[name] = self._num_norms.get(name, 0) + 1

    def count(self) -> None:
        """Count what waits."""
        for name in self._waiting:
            self._count(name)

    def gradient_norms(self) -> dict[str, tuple[float, int]]:
        """Sum of the norms of each router's gradient, and how many were noted."""
        return {name: (float(total), self._num_norms[name]) for name, total in self._norms.items()}

    def reset(self) -> None:
        """Begin an epoch."""
        self._waiting, self._num_waiting = {}, {}
        self._norms, self._num_norms, self._num_steps = {}, {}, {}
        for metric in self._metrics.values():
            metric.reset()

    def metric(self, name: str, kind: RouterKind) -> ExpertUtilizationMetric:
        """The metric of a router, an empty one if it has not run."""
        if name not in self._metrics:
            self._metrics[name] = ExpertUtilizationMetric(kind.num_experts).to(kind.device)
        return self._metrics[name]

    def _count(self, name: str) -> None:
        waiting, self._waiting[name], self._num_waiting[name] = self._waiting[name], [], 0
        for routing in _joined(waiting):
            if name not in self.kinds:
                # "cuda", not "cuda:0": each rank has its own. The GPU of a Mac has no double precision.
                device = routing.logits.device.type
                self.kinds[name] = RouterKind(routing.num_experts, routing.soft, "cpu" if device == "mps" else device)
            self.metric(name, self.kinds[name]).update(routing)


def _kept(routing: Routing) -> Routing:
    """What is counted of a routing: without the graph, and safe from a CUDA graph that writes the next step there."""
    tensors: dict[str, Any] = {}
    for name in _COUNTED:
        value = getattr(routing, name)
        if value is not None:
            value = value.detach() if value.requires_grad else value
            tensors[name] = value.clone() if value.is_cuda else value
    return Routing(**tensors, rows_per_sample=routing.rows_per_sample)


def _joined(routings: Sequence[Routing]) -> list[Routing]:
    """As few routings with the same rows; where experts choose rows of a batch, the batches stay apart."""
    groups: dict[tuple[object, ...], list[Routing]] = {}
    for number, routing in enumerate(routings):
        form = tuple(None if (t := getattr(routing, name)) is None else (t.shape[1:], t.dtype) for name in _COUNTED)
        alone = None if routing.rows is None else number
        groups.setdefault((alone, routing.rows_per_sample, *form), []).append(routing)
    return [group[0] if len(group) == 1 else _cat(group) for group in groups.values()]


def _cat(group: Sequence[Routing]) -> Routing:
    parts = {f.name: [getattr(routing, f.name) for routing in group] for f in fields(Routing) if f.name in _COUNTED}
    tensors: dict[str, Any] = {name: torch.cat(values) for name, values in parts.items() if values[0] is not None}
    return Routing(**tensors, rows_per_sample=group[0].rows_per_sample)
