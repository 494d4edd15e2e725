"""Experts, slots and router rows of the mixtures of this package.

A mixture is traced as one function: its output is a sum over experts, so the experts can be permuted together with
everything that its router holds for each of them.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor, nn

from moe_heads.analysis.weight_matching.expert_group import ExpertGroup, PerExpert
from moe_heads.analysis.weight_matching.units import Axis, TracedTensors, is_fixed
from moe_heads.experts import Experts
from moe_heads.moe_layer import LayerOutput, MoELayer
from moe_heads.routers import LinearRouter
from moe_heads.routing import Router
from moe_heads.soft_moe import SoftMoE
from moe_heads.sparse_mixture import SparseMixture

__all__ = ["Mixture", "is_mixture", "trace_mixture"]

Mixture = SoftMoE | SparseMixture
"""Heads and layers of this package with experts."""


def is_mixture(module: nn.Module) -> TypeGuard[Mixture]:
    """Return whether a module is a mixture of this package."""
    return isinstance(module, (SoftMoE, SparseMixture))


def trace_mixture(
    name: str, module: Mixture, x: Tensor, output: Any, traced: TracedTensors, known: Collection[str]
) -> list[ExpertGroup]:
    """Tie the features of a mixture to its input and output, and return the groups of its experts.

    Args:
        name: Name of the module.
        module: The mixture.
        x: Its input.
        output: Its output.
        traced: The traced tensors, in which the output is recorded.
        known: Names of the groups that earlier calls returned. They are not returned again.
    """
    names = {id(tensor): key for key, tensor in _named(module, name)}
    *rows, features = traced.of(x)
    if not all(map(is_fixed, rows)):
        traced.fix(x)
    order = int(traced.table.fresh(1)[0])  # after everything that was traced before
    out = traced.table.fresh(module.experts.out_features)
    slots = _tie_router(module.router, features, traced)
    stacks = [("experts", module.experts, slots is not None)]
    if isinstance(module, SparseMixture) and module.shared is not None:
        stacks.append(("shared", module.shared, True))
    groups = []
    for kind, experts, moves in stacks:
        _tie_experts(experts, features, out, traced)
        group_name = f"{name}.{kind}" if name else kind
        router = slots if kind == "experts" else None
        if group_name not in known:
            groups.append(_group(group_name, order, experts, moves, router, names))
    if isinstance(module, MoELayer):
        result = output.output if isinstance(output, LayerOutput) else output
        axes = traced.of(result)
        traced.put(result, (*axes[:-1], out))
    else:
        traced.table.fix(out)
    return groups


def _named(module: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(prefix), *module.named_buffers(prefix)]


def _group(
    name: str,
    order: int,
    experts: Experts,
    moves: bool,
    router: "Mapping[int, tuple[int, ...]] | None",
    names: Mapping[int, str],
) -> ExpertGroup:
    stacked: dict[int, tuple[tuple[int, ...], int]] = {
        id(experts.fc1.weight): (tuple(experts.fc1.weight.shape), 1),
        id(experts.fc1.bias): ((experts.num_experts, experts.width), 1),
        id(experts.fc2.weight): (tuple(experts.fc2.weight.shape), 2),
    }
    hidden = PerExpert("hidden units", experts.width, {names[key]: view for key, view in stacked.items()})
    rows = router or {}
    whole = [id(experts.fc2.bias), *(key for key, shape in rows.items() if len(shape) < 2 or shape[1] == 1)]
    slotted = {names[key]: (shape, 1) for key, shape in rows.items() if len(shape) > 1 and shape[1] > 1}
    inside = [hidden]
    if slotted:
        size = next(iter(slotted.values()))[0][1]
        inside.append(PerExpert("slots", size, slotted))
    return ExpertGroup(name, order, experts.num_experts, tuple(names[key] for key in whole), tuple(inside), moves)


def _tie_experts(experts: Experts, features: Axis, out: Axis, traced: TracedTensors) -> None:
    first, hidden, into = traced.of(experts.fc1.weight)
    traced.table.merge(features, into)
    last, outputs, units = traced.of(experts.fc2.weight)
    traced.table.merge(outputs, out)
    traced.table.merge(traced.of(experts.fc2.bias)[0], np.tile(out, experts.num_experts))
    # the group of the experts permutes the others
    for axis in (first, hidden, last, units, *traced.of(experts.fc1.bias)):
        traced.table.fix(axis)


def _tie_router(router: Router, features: Axis, traced: TracedTensors) -> dict[int, tuple[int, ...]] | None:
    """Tie the features that a router reads, and return the shape (E, S, ...) of each of its tensors by identity.

    Returns None for a router with other tensors than those of a `LinearRouter`, whose experts then keep their order.
    """
    shapes: dict[int, tuple[int, ...]] = {}
    ties: list[tuple[Tensor, Axis]] = []
    is_known = isinstance(router, LinearRouter)
    for _, module in router.named_modules():
        is_linear = isinstance(module, nn.Linear)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            number, rest = divmod(len(tensor) if tensor.dim() else 0, router.num_experts)
            is_known &= not rest and number > 0 and (is_linear or number == 1)
            shapes[id(tensor)] = (router.num_experts, number, *tensor.shape[1:])
            if tensor.dim() > 1:
                extra = tensor.shape[1] - len(features)  # a router may keep a copy of the weight with its bias
                is_known &= tensor.dim() == 2 and extra in {0, 1}
                ties.append((tensor, np.concatenate([features, np.zeros(max(extra, 0), dtype=np.int64)])))
    if not is_known:
        traced.table.fix(features)
        for tensor in (*router.parameters(), *router.buffers()):
            traced.fix(tensor)
        return None
    for tensor, axis in ties:
        rows, columns = traced.of(tensor)
        traced.table.merge(columns, axis)
        traced.table.fix(rows)
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.dim() == 1:
            traced.fix(tensor)
    return shapes
