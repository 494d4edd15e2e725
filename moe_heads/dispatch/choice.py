"""Selection of the dispatch path: the requested one, or the fastest for the shape, device and mode."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from moe_heads.dispatch.all_experts import mix_all
from moe_heads.dispatch.gathered import mix_gathered
from moe_heads.dispatch.grouped import mix_grouped, why_not_grouped
from moe_heads.dispatch.ragged import mix_ragged, reads_memory
from moe_heads.experts import Experts
from moe_heads.modes import can_read_values, is_vmapped
from moe_heads.precision import is_autocasting
from moe_heads.routing import Routing

__all__ = ["Dispatch", "keep_outside_the_graph", "mix", "path_of"]

Dispatch = Literal["auto", "all", "gathered", "grouped", "ragged"]

_PATHS: Mapping[str, Callable[[Experts, Tensor, Routing], Tensor]] = {
    "all": mix_all,
    "gathered": mix_gathered,
    "grouped": mix_grouped,
    "ragged": mix_ragged,
}

# The ragged path reads values, so a compiled graph breaks there. With fullgraph=True torch quotes the reason. The entry
# is made for the first head that names the path, because `torch.compiler.disable` imports the compiler, which takes
# seconds.
_outside_the_graph: dict[str, Callable[[Experts, Tensor, Routing], Tensor]] = {}

# Overhead of a path in equivalent multiply-adds of the CPU: a constant, a part per chosen expert, and a part per copied
# feature of each choice. Fitted by examples/benchmarks/dispatch.py on one thread of a server processor with AVX-512, in
# fp32.
_MACS_ONCE = {"ragged": 0, "grouped": 1_500_000}
_MACS_PER_EXPERT = {"ragged": 350_000, "grouped": 150_000}
_MACS_PER_COPIED_FEATURE = 32
# Up to this many rows a compiled loop over gathered weights is faster than the grouped product in inference.
_FEW_ROWS = 32
# If the weights and the hidden units of all choices fit in the cache, one grouped product is faster than one product
# per expert.
_HIDDEN_BYTES = 2**20


def mix(experts: Experts, x: Tensor, routing: Routing, dispatch: Dispatch) -> Tensor:
    """Compute the weighted sum of the experts that a routing chose.

    Args:
        experts: The experts.
        x: Rows, (N, D).
        routing: Their routing.
        dispatch: Name of a path, or "auto".

    Returns:
        Logits, (N, C).

    Raises:
        ValueError: If the rows and the experts have different dtypes, or the named path does not support the routing,
            dtype, device, shape or mode.
    """
    path = path_of(experts, x, routing, dispatch)
    if torch.compiler.is_compiling() and path in _outside_the_graph:
        return _outside_the_graph[path](experts, x, routing)
    return _PATHS[path](experts, x, routing)


def keep_outside_the_graph(dispatch: Dispatch) -> None:
    """Exclude a path from compiled graphs if it reads values."""
    if dispatch == "ragged" and dispatch not in _outside_the_graph:
        _outside_the_graph[dispatch] = torch.compiler.disable(
            mix_ragged, reason="dispatch='ragged' reads the segment lengths. Use dispatch='auto'"
        )


def path_of(experts: Experts, x: Tensor, routing: Routing, dispatch: Dispatch) -> Dispatch:
    """Return the name of the path that `mix` takes: the named one, or the choice of "auto".

    Args:
        experts: The experts.
        x: Rows, (N, D).
        routing: Their routing.
        dispatch: Name of a path, or "auto".

    Raises:
        ValueError: As `mix` does.
    """
    if x.dtype != experts.fc1.weight.dtype and not is_autocasting(x):
        raise ValueError(
            f"x: expected {experts.fc1.weight.dtype}, the dtype of the experts, got {x.dtype}. Cast x or the model."
        )
    if dispatch == "auto":
        return _fastest(experts, x, routing)
    _check(experts, x, routing, dispatch)
    return dispatch


def _fastest(experts: Experts, x: Tensor, routing: Routing) -> Dispatch:
    if routing.weights is None or x.device.type != "cpu":
        return "all"
    num_rows = x.shape[0]
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() or is_vmapped():
            return "all"
        if num_rows <= _FEW_ROWS and routing.indices is not None and routing.indices.shape[1] < experts.num_experts:
            return "gathered"
        pays = _pays("grouped", experts, num_rows, routing.weights.numel()) and not why_not_grouped(experts, x)
        return "grouped" if pays else "all"
    if not can_read_values(x):
        return "all"
    num_choices = routing.weights.numel()
    if num_rows == 1:
        return "ragged" if num_choices < experts.num_experts else "all"
    in_cache = num_choices * experts.width * x.itemsize < _HIDDEN_BYTES and not reads_memory(experts)
    if in_cache and 2 * num_choices >= experts.num_experts:
        pays = _pays("grouped", experts, num_rows, num_choices)
        if pays and not why_not_grouped(experts, x):
            return "grouped"
    return "ragged" if _pays("ragged", experts, num_rows, num_choices) else "all"


def _pays(path: str, experts: Experts, num_rows: int, num_choices: int) -> bool:
    """Return whether running only the chosen experts saves more arithmetic than the overhead of the path costs."""
    saved = (num_rows * experts.num_experts - num_choices) * experts.flops_per_row // 2
    per_expert = min(experts.num_experts, num_choices) * _MACS_PER_EXPERT[path]
    copied = num_choices * experts.in_features * _MACS_PER_COPIED_FEATURE
    return bool(saved > _MACS_ONCE[path] + per_expert + copied)


def _check(experts: Experts, x: Tensor, routing: Routing, dispatch: Dispatch) -> None:
    if dispatch == "all":
        return
    reason = None
    if routing.weights is None:
        reason, instead = "expected a sparse router, got one that mixes all experts", "all"
    elif dispatch == "gathered" and routing.indices is None:
        reason, instead = "expected rows that choose their experts, got experts that choose their rows", "ragged"
    elif dispatch == "grouped":
        reason, instead = why_not_grouped(experts, x), "all" if is_vmapped() else "ragged"
    elif dispatch == "ragged" and not _serves_ragged(x):
        reason = "expected eager mode, since it reads the segment lengths, got tracing, capture, vmap or a meta tensor"
        instead = "all"
    if reason is not None:
        raise ValueError(f"dispatch={dispatch!r}: {reason}. Use dispatch={instead!r}.")


def _serves_ragged(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        # it runs outside the graph, which is not possible in an export
        return not torch.compiler.is_exporting()
    return can_read_values(x)
