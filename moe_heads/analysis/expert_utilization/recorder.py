"""Recording of the routers of a model during training, at negligible cost per step.

The decisions for a batch are a few numbers per row. They are kept as they are and counted in groups of some hundred
thousand numbers. So a step stores only a few references, and nothing synchronizes with the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.shards import full
from moe_heads.analysis.expert_utilization.metric import ExpertUtilizationMetric
from moe_heads.analysis.expert_utilization.router_sums import RouterSums
from moe_heads.routing import Routing, RoutingCollection

__all__ = ["RouterKind", "UtilizationRecorder"]

# Number of elements of the (N, E) logits from which the pending decisions are counted, about the size of a cache. With
# a quarter of it, and with eight times as much, a step costs a fifth more.
_MAX_PENDING = 2**17

# A norm costs as much as ten small operations. On every step it would cost a twentieth of the training of a head alone.
_STEPS_BETWEEN_NORMS = 20

_COUNTED = ("logits", "probs", "indices", "weights", "rows", "scores", "noisy_logits", "mask")
_tensors_of = attrgetter(*_COUNTED)

# rows_per_sample, drops and the counted tensors: to build a Routing of them in every step costs more than to keep them
_Pending = tuple[tuple[int, bool], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class RouterKind:
    """Properties of a router that are needed to count its decisions.

    Attributes:
        num_experts: E.
        soft: Whether it mixes all experts.
        device: Device of its decisions.
    """

    num_experts: int
    soft: bool
    device: str


class UtilizationRecorder:
    """Recorder of the utilization of each router over a window of training steps, such as an epoch.

    Attributes:
        kinds: Kind of each router that ran, by name.
        errors: Errors of decisions that cannot be counted, by the name of the router, which is left out from then on:
            an adapter returned shapes that do not fit, for example.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, RouterKind] = {}
        self.errors: dict[str, Exception] = {}
        self._metrics: dict[str, ExpertUtilizationMetric] = {}
        self._pending: dict[str, list[_Pending]] = {}
        self._num_pending: dict[str, int] = {}
        self._norms: dict[str, Tensor] = {}
        self._num_norms: dict[str, int] = {}
        self._num_steps: dict[int, int] = {}

    def record(self, collection: RoutingCollection) -> None:
        """Move the routings of a batch from the collection to this recorder."""
        for name, passes in collection.routings.items():
            if name in self.errors:
                passes.clear()
                continue
            self._pending.setdefault(name, []).extend(map(_counted_tensors, passes))
            num_pending = self._num_pending.get(name, 0) + sum(routing.logits.numel() for routing in passes)
            self._num_pending[name] = num_pending
            passes.clear()
            if num_pending >= _MAX_PENDING:
                self._count(name)

    def record_gradients(self, routers: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Record the gradient norms before a step of an optimizer, in the first step and every twentieth after it."""
        steps = self._num_steps[id(optimizer)] = self._num_steps.get(id(optimizer), 0) + 1
        if steps % _STEPS_BETWEEN_NORMS != 1:
            return
        optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, router in routers.items():
            gradients = [p.grad.detach() for p in router.parameters() if p in optimized and p.grad is not None]
            if gradients:
                norm = full(torch.nn.utils.get_total_norm(gradients)).double()
                self._norms[name] = self._norms[name] + norm if name in self._norms else norm
                self._num_norms[name] = self._num_norms.get(name, 0) + 1

    def count(self) -> None:
        """Count the pending decisions."""
        for name in self._pending:
            self._count(name)

    def sums(self, name: str, kind: RouterKind) -> RouterSums:
        """Return what was counted for a router, zeros if it has not run, on the device of its decisions."""
        metric = self.metric(name, kind)
        norm_sum = self._norms.get(name, torch.zeros(())).to(kind.device, torch.float64)
        num_norms = torch.tensor(self._num_norms.get(name, 0), device=kind.device)
        return RouterSums(metric.stats, metric.num_compared.clone(), metric.num_agreeing.clone(), norm_sum, num_norms)

    def reset(self) -> None:
        """Reset all states at the start of a window."""
        self._pending, self._num_pending = {}, {}
        self._norms, self._num_norms, self._num_steps = {}, {}, {}
        for metric in self._metrics.values():
            metric.reset()

    def metric(self, name: str, kind: RouterKind) -> ExpertUtilizationMetric:
        """Return the metric of a router, an empty one if the router has not run."""
        if name not in self._metrics:
            self._metrics[name] = ExpertUtilizationMetric(kind.num_experts).to(kind.device)
        return self._metrics[name]

    def _count(self, name: str) -> None:
        pending, self._pending[name], self._num_pending[name] = self._pending[name], [], 0
        try:
            for routing in _join(pending):
                if name not in self.kinds:
                    # "cuda", not "cuda:0": each rank has its own device. The GPU of a Mac has no double precision.
                    device = routing.logits.device.type
                    self.kinds[name] = RouterKind(
                        routing.num_experts, routing.soft, "cpu" if device == "mps" else device
                    )
                self.metric(name, self.kinds[name]).update(routing)
        except (ValueError, IndexError, RuntimeError) as error:
            # what cannot be counted must not end a training
            self.errors[name] = error
            self.kinds.pop(name, None)
            self._metrics.pop(name, None)


def _counted_tensors(routing: Routing) -> _Pending:
    """Return the counted tensors of a routing, detached, and copied where a CUDA graph could overwrite them."""
    return (routing.rows_per_sample, routing.drops), tuple(
        None if value is None else _safe(value) for value in _tensors_of(routing)
    )


def _safe(value: Tensor) -> Tensor:
    value = value.detach() if value.requires_grad else value
    return value.clone() if value.is_cuda else value


def _join(pending: Sequence[_Pending]) -> list[Routing]:
    """Concatenate the decisions to few routings. Under expert choice the batches remain separate."""
    groups: dict[tuple[object, ...], list[_Pending]] = {}
    chosen_rows = _COUNTED.index("rows")
    for number, (settings, values) in enumerate(pending):
        form = tuple(None if value is None else (value.shape[1:], value.dtype) for value in values)
        alone = None if values[chosen_rows] is None else number
        groups.setdefault((alone, settings, *form), []).append((settings, values))
    return [_cat(group) for group in groups.values()]


def _cat(group: Sequence[_Pending]) -> Routing:
    columns = zip(_COUNTED, zip(*(values for _, values in group), strict=True), strict=True)
    several = {name: parts for name, parts in columns if parts[0] is not None}
    tensors: dict[str, Any] = {n: parts[0] if len(parts) == 1 else torch.cat(parts) for n, parts in several.items()}
    rows_per_sample, drops = group[0][0]
    return Routing(**tensors, rows_per_sample=rows_per_sample, drops=drops)
