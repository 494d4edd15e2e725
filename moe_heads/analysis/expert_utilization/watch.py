"""What the routers of a model do while it trains, at next to no cost for a step.

A batch's decisions are a few numbers a row: they are kept as they are, and counted some hundred thousand numbers at a
time. So a step pays for a few references, and nothing waits for the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis.expert_utilization.metric import ExpertUtilizationMetric
from moe_heads.routing import Routing, RoutingCollection

__all__ = ["RouterKind", "RoutingWatch"]

# Numbers of the (N, E) logits after which the decisions that wait are counted: what a cache holds. With a quarter of it
# and with eight times as much a step costs a fifth more.
_MAX_WAITING = 2**17

# A norm costs as much as ten small operations: on every step a twentieth of the training of a head alone.
_STEPS_BETWEEN_NORMS = 20

_COUNTED = ("logits", "probs", "indices", "weights", "rows", "scores", "noisy_logits")
_tensors_of = attrgetter(*_COUNTED)

# rows_per_sample and what is counted: to build a Routing of them costs a step more than to keep them
_Kept = tuple[int, tuple[Tensor | None, ...]]


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
    """Utilization of each router over the training steps of an epoch.

    Attributes:
        kinds: Kind of each router that ran, by name.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, RouterKind] = {}
        self._metrics: dict[str, ExpertUtilizationMetric] = {}
        self._waiting: dict[str, list[_Kept]] = {}
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


def _kept(routing: Routing) -> _Kept:
    """What is counted of a routing: without the graph, and safe from a CUDA graph that writes the next step there."""
    return routing.rows_per_sample, tuple(None if value is None else _safe(value) for value in _tensors_of(routing))


def _safe(value: Tensor) -> Tensor:
    value = value.detach() if value.requires_grad else value
    return value.clone() if value.is_cuda else value


def _joined(waiting: Sequence[_Kept]) -> list[Routing]:
    """As few routings with the same rows; where experts choose rows of a batch, the batches stay apart."""
    groups: dict[tuple[object, ...], list[_Kept]] = {}
    chosen_rows = _COUNTED.index("rows")
    for number, (rows_per_sample, values) in enumerate(waiting):
        form = tuple(None if value is None else (value.shape[1:], value.dtype) for value in values)
        alone = None if values[chosen_rows] is None else number
        groups.setdefault((alone, rows_per_sample, *form), []).append((rows_per_sample, values))
    return [_cat(group) for group in groups.values()]


def _cat(group: Sequence[_Kept]) -> Routing:
    columns = zip(_COUNTED, zip(*(values for _, values in group), strict=True), strict=True)
    several = {name: parts for name, parts in columns if parts[0] is not None}
    tensors: dict[str, Any] = {n: parts[0] if len(parts) == 1 else torch.cat(parts) for n, parts in several.items()}
    return Routing(**tensors, rows_per_sample=group[0][0])
