"""Selection of the dispatch path: the requested one, or the fastest for the shape, device and mode."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from moe_heads.dispatch.all_experts import mix_all
from moe_heads.dispatch.gathered import mix_gathered
from moe_heads.dispatch.grouped import mix_grouped, why_not_grouped
from moe_heads.dispatch.ragged import mix_ragged
from moe_heads.experts import Experts
from moe_heads.modes import can_read_values, is_vmapped
from moe_heads.precision import compute_dtype, is_autocasting
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

# Costs in units of one multiply-add of a matrix product in fp32 on one CPU thread. examples/benchmarks/dispatch.py
# compares the choice with the fastest path. One set of constants serves AVX2, AVX-512 and AMX: all paths run the same
# products, so a processor that multiplies twice as fast only moves the number of rows at which two paths are equal.
_MACS_SORT = 2_000_000  # sorts the choices, and sums their logits by row
_MACS_PER_COPIED_FEATURE = 50  # gathers the rows of the choices
_MACS_PER_LAUNCHED_EXPERT = 400_000  # calls of one expert from Python
_MACS_PER_LOOPED_EXPERT = 60_000  # one expert in the loop inside the grouped product, also without rows
_ROWS_PER_READ = 8  # the weights of an expert are read in the time of the products of so many rows
# In inference the ragged path computes expert by expert. The grouped path writes the rows and hidden units of all
# choices between its products. They leave the cache if those of one expert are larger than this.
_CACHED_BYTES = 2**18
# A compiled loop over gathered weights reads those of an expert again for every choice, faster if all fit in the cache.
_ROWS_PER_CACHED_READ = 3
_CACHED_WEIGHTS_BYTES = 2**21


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
    if routing.weights is None or not x.is_cpu:
        return "all"
    if torch.compiler.is_compiling():
        return "all" if torch.compiler.is_exporting() or is_vmapped() else _fastest_compiled(experts, x, routing)
    if not can_read_values(x):
        return "all"
    ranking = _ranking(
        experts.num_experts,
        experts.in_features,
        experts.width,
        experts.out_features,
        x.shape[0],
        routing.weights.numel(),
        x.itemsize,
        torch.is_grad_enabled(),
    )
    return next(path for path in ranking if path != "grouped" or _serves_grouped(experts, x))


def _fastest_compiled(experts: Experts, x: Tensor, routing: Routing) -> Dispatch:
    assert routing.weights is not None
    num_experts, num_choices = experts.num_experts, routing.weights.numel()
    macs = experts.flops_per_row // 2
    costs = _costs(num_experts, experts.in_features, macs, x.shape[0], num_choices, min(num_experts, num_choices))
    grouped = costs["grouped"] if _serves_grouped(experts, x) else math.inf
    if routing.indices is not None and num_choices < x.shape[0] * num_experts:
        is_cached = num_experts * macs * x.itemsize <= _CACHED_WEIGHTS_BYTES
        rows_per_read = _ROWS_PER_CACHED_READ if is_cached else _ROWS_PER_READ
        if macs * num_choices * rows_per_read < min(costs["all"], grouped):
            return "gathered"
    return "grouped" if grouped < costs["all"] else "all"


@functools.lru_cache(maxsize=4096)  # for few rows this arithmetic takes as long as the selection of the experts
def _ranking(
    num_experts: int,
    features: int,
    width: int,
    classes: int,
    num_rows: int,
    num_choices: int,
    itemsize: int,
    training: bool,
) -> tuple[Dispatch, ...]:
    """Return the paths of eager mode by their estimated cost."""
    hit: float = num_experts  # in training, where a backward pass writes the gradients of all experts
    if num_rows and not training:
        hit *= 1 - (1 - num_choices / (num_rows * num_experts)) ** num_rows  # expectation if all are equally likely
    costs = _costs(num_experts, features, width * (features + classes), num_rows, num_choices, hit)
    if not training and num_choices * (features + width) * itemsize > num_experts * _CACHED_BYTES:
        del costs["grouped"]
    return tuple(sorted(costs, key=costs.__getitem__))


def _costs(
    num_experts: int, features: int, macs: int, num_rows: int, num_choices: int, hit: float
) -> dict[Dispatch, float]:
    """Estimate the cost of each path. ``macs`` is that of one expert on one row, ``hit`` the number of experts used."""
    products = macs * (num_choices + hit * _ROWS_PER_READ)
    sort = _MACS_SORT + num_choices * features * _MACS_PER_COPIED_FEATURE
    return {
        "all": macs * num_experts * (num_rows + _ROWS_PER_READ),
        "ragged": products + hit * _MACS_PER_LAUNCHED_EXPERT + (sort if num_rows > 1 else 0),
        "grouped": products + num_experts * _MACS_PER_LOOPED_EXPERT + sort,
    }


def _serves_grouped(experts: Experts, x: Tensor) -> bool:
    # in half precision the grouped product casts the weights of all experts, and is slow on most CPUs
    return compute_dtype(x) == torch.float32 and why_not_grouped(experts, x) is None


def _check(experts: Experts, x: Tensor, routing: Routing, dispatch: Dispatch) -> None:
    if dispatch == "all":
        return
    reason = None
    if routing.weights is None:
        reason, instead = "expected a sparse router, got one that mixes all experts", "all"
    elif dispatch == "gathered" and routing.indices is None:
        reason, instead = "expected rows that choose their experts, got experts that choose their rows", "ragged"
    elif dispatch == "grouped":
        instead = "all" if is_vmapped() or torch.compiler.is_compiling() else "ragged"
        reason = why_not_grouped(experts, x)
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
