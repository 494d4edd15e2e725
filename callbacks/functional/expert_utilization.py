"""How the experts of a trained model are used: by how many samples, with which weight, for which classes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.batches import (
    Batch,
    ForwardFn,
    as_batches,
    batch_size,
    call_model,
    labels_of,
    to_device,
)
from moe_heads.callbacks.functional.environment import device_of
from moe_heads.callbacks.functional.preserve import analysis_mode
from moe_heads.callbacks.functional.utilization.result import ExpertUtilizationResult
from moe_heads.callbacks.functional.utilization.sums import UtilizationSums
from moe_heads.routing import Router, Routing, collect_routing

__all__ = ["expert_utilization"]


def expert_utilization(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    forward_fn: ForwardFn = call_model,
    label_fn: Callable[[Batch], Tensor | None] = labels_of,
    dead_below: float = 0.01,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> ExpertUtilizationResult:
    """Load, importance, entropy, dead experts and class map of every router of this package inside the model.

    One pass over the data in evaluation mode (no noise on the router), without gradients; sums are taken in float64.
    Rows whose router logits are not finite count in nothing but ``num_nonfinite``. The model is evaluated inside
    `analysis_mode` and left bit for bit as it was, also after an error.

    Args:
        model: The model. One without a router of ours is not run and gives a result without heads.
        batches: The data.
        num_classes: C; by default the number of ``class_names``, else the largest label plus one.
        class_names: Names of the classes for figures and tables.
        forward_fn: ``forward_fn(model, batch)`` runs the model; its output is not used.
        label_fn: ``label_fn(batch) -> labels (B,)``, or None for data without labels: then there is no class map.
        dead_below: An expert is dead when its load is below this fraction of the fair share 1/E; for a soft router,
            which runs every expert, when its importance is. With 1 %, an expert with a single stray sample in a
            thousand is dead too.
        seed: Seed of the random number generators.
        on_step: Called after each batch with the number of batches done and their total.

    Returns:
        The numbers by head.

    Raises:
        ValueError: If the data is empty, labels are out of range, missing in some batches or do not fit the routed
            rows, or no logit of a router is finite.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> from moe_heads.callbacks.functional.expert_utilization import expert_utilization
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), SparseMoE(16, 3, num_experts=4, expert_width=8))
        >>> batch = torch.randn(50, 4, 4), torch.randint(3, (50,))
        >>> result = expert_utilization(model, [batch])
        >>> result.load["1"].shape, result.class_map["1"].shape
        (torch.Size([4]), torch.Size([3, 4]))
    """
    if not any(isinstance(module, Router) for module in model.modules()):
        return ExpertUtilizationResult({}, _names(num_classes, class_names), sum(map(batch_size, as_batches(batches))))
    if not 0 <= dead_below < 1:
        raise ValueError(f"dead_below: expected a fraction in [0, 1); got {dead_below}")
    data = as_batches(batches)
    labels, num_classes = _labels([label_fn(batch) for batch in data], num_classes, class_names)
    device = device_of(model)
    sums: dict[str, UtilizationSums] = {}
    with analysis_mode(model, seed), torch.no_grad():
        for index, batch in enumerate(data):
            with collect_routing(model) as collection:
                forward_fn(model, to_device(batch, device))
            for name, routings in collection.routings.items():
                for routing in map(_in_float64, routings):
                    head = sums.setdefault(name, UtilizationSums(name, routing, num_classes))
                    head.add(routing, None if labels is None else labels[index])
            if on_step is not None:
                on_step(index + 1, len(data))
    return ExpertUtilizationResult(
        heads={name: head.result(dead_below) for name, head in sums.items()},
        class_names=_names(num_classes, class_names),
        num_samples=sum(batch_size(batch) for batch in data),
    )


def _labels(
    found: list[Tensor | None], num_classes: int | None, class_names: Sequence[str] | None
) -> tuple[list[Tensor] | None, int | None]:
    """Labels of each batch, on the CPU, and C; None and None without labels."""
    if class_names is not None and num_classes is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names: expected num_classes = {num_classes} names; got {len(class_names)}")
    given = [labels.cpu() for labels in found if labels is not None]
    if not given:
        return None, None
    if len(given) < len(found):
        raise ValueError(f"label_fn: expected labels for every batch or for none; {len(found) - len(given)} have none")
    if any(labels.dim() != 1 or labels.is_floating_point() for labels in given):
        raise ValueError("label_fn: expected one whole number a sample, shape (B,); got another shape or data type")
    lowest, highest = (int(bound) for bound in torch.cat(given).aminmax())
    if num_classes is None:
        num_classes = highest + 1 if class_names is None else len(class_names)
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"labels: expected classes 0 to {num_classes - 1}; got {lowest} to {highest}")
    return given, num_classes


def _names(num_classes: int | None, class_names: Sequence[str] | None) -> tuple[str, ...]:
    if num_classes is None:
        return ()
    return tuple(class_names) if class_names is not None else tuple(str(index) for index in range(num_classes))


def _in_float64(routing: Routing) -> Routing:
    """What the sums need of a routing, on the CPU: (N, E) numbers are few, and a sum of millions needs float64."""
    return replace(
        routing,
        logits=routing.logits.cpu().double(),
        probs=routing.probs.cpu().double(),
        indices=None if routing.indices is None else routing.indices.cpu(),
        weights=None if routing.weights is None else routing.weights.cpu().double(),
    )
