"""Axes of the outputs of torch functions, by the name of the function.

A rule merges the units that a function ties together and gives the axes of the output. A function without a rule fixes
the units of all of its tensors, so its inputs keep their order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from moe_heads.analysis.weight_matching.function_names import BINARY, ELEMENTWISE, POOLS, REDUCTIONS, RESHAPES
from moe_heads.analysis.weight_matching.reshapes import reshaped
from moe_heads.analysis.weight_matching.units import Axes, Axis, TracedTensors, is_fixed

__all__ = ["RULES", "Rule"]

Rule = Callable[..., "Axes | None"]
"""``rule(traced, output, *args, **kwargs)`` returns the axes of the output; None for a case that is not supported."""


def _linear(traced: TracedTensors, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Axes:
    out, into = traced.of(weight)
    *rows, features = traced.of(x)
    traced.table.merge(features, into)
    if bias is not None:
        traced.table.merge(traced.of(bias)[0], out)
    return (*rows, out)


def _embedding(traced: TracedTensors, output: Tensor, x: Tensor, weight: Tensor, *args: Any, **named: Any) -> Axes:
    entries, features = traced.of(weight)
    traced.table.fix(entries)
    return (*traced.of(x), features)


def _convolution(
    traced: TracedTensors,
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **named: Any,
) -> Axes | None:
    batch, channels, *pixels = traced.of(x)
    out, into, *kernel = traced.of(weight)
    groups = named.get("groups", args[3] if len(args) > 3 else 1)
    if x.dim() != weight.dim() or not all(map(is_fixed, pixels)):
        return None
    for axis in kernel:
        traced.table.fix(axis)
    if groups == 1:
        traced.table.merge(channels, into)
    elif groups == len(channels) == len(out):  # depthwise: a channel keeps its unit
        traced.table.merge(channels, out)
        traced.table.fix(into)
    else:
        return None
    if bias is not None:
        traced.table.merge(traced.of(bias)[0], out)
    return (batch, out, *(np.zeros(size, dtype=np.int64) for size in output.shape[2:]))


def _batch_norm(traced: TracedTensors, output: Tensor, x: Tensor, *args: Any, **named: Any) -> Axes:
    axes = traced.of(x)
    others = [*args[:4], *(named.get(name) for name in ("running_mean", "running_var", "weight", "bias"))]
    for tensor in others:
        if isinstance(tensor, Tensor):
            traced.table.merge(traced.of(tensor)[0], axes[1])
    return axes


def _layer_norm(
    traced: TracedTensors, output: Tensor, x: Tensor, shape: Sequence[int], *args: Any, **named: Any
) -> Axes | None:
    axes = traced.of(x)
    for tensor in (*args[:2], named.get("weight"), named.get("bias")):
        if isinstance(tensor, Tensor):
            for own, axis in zip(traced.of(tensor), axes[-len(shape) :], strict=True):
                traced.table.merge(own, axis)
    return axes


def _elementwise(traced: TracedTensors, output: Tensor, x: Tensor, *others: Any, **named: Any) -> Axes | None:
    if any(other in traced for other in others if isinstance(other, Tensor)):
        return None
    return traced.of(x)


def _prelu(traced: TracedTensors, output: Tensor, x: Tensor, weight: Tensor) -> Axes:
    axes, (slopes,) = traced.of(x), traced.of(weight)
    if len(slopes) == 1:
        traced.table.fix(slopes)
    else:
        traced.table.merge(axes[1], slopes)
    return axes


def _binary(traced: TracedTensors, output: Tensor, x: Any, other: Any, *args: Any, **named: Any) -> Axes | None:
    tensors = [value for value in (x, other) if isinstance(value, Tensor)]
    found: list[Axis] = [np.zeros(size, dtype=np.int64) for size in output.shape]
    is_set = [False] * output.dim()
    for tensor in tensors:
        axes = traced.of(tensor)
        for place, axis in enumerate(axes, start=output.dim() - len(axes)):
            if len(axis) == 1 < len(found[place]):  # broadcast
                traced.table.fix(axis)
            elif is_set[place]:
                traced.table.merge(found[place], axis)
            else:
                found[place], is_set[place] = axis, True
    return tuple(found)


def _pool(traced: TracedTensors, output: Any, x: Tensor, *args: Any, **named: Any) -> Axes | None:
    dims = x.dim() - 2
    axes = traced.of(x)
    if not isinstance(output, Tensor) or dims < 1 or not all(map(is_fixed, axes[2:])):
        return None
    return (*axes[:2], *(np.zeros(size, dtype=np.int64) for size in output.shape[2:]))


def _reduction(traced: TracedTensors, output: Any, x: Tensor, *args: Any, **named: Any) -> Axes | None:
    axes = traced.of(x)
    dim = named.get("dim", args[0] if args else None)
    if dim is None or not isinstance(output, Tensor):
        return () if isinstance(output, Tensor) and output.dim() == 0 else None
    dims = {place % x.dim() for place in ([dim] if isinstance(dim, int) else dim)}
    if output.dim() == x.dim():
        return tuple(np.zeros(1, dtype=np.int64) if place in dims else axis for place, axis in enumerate(axes))
    return tuple(axis for place, axis in enumerate(axes) if place not in dims)


def _reshape(traced: TracedTensors, output: Tensor, x: Tensor, *args: Any, **named: Any) -> Axes | None:
    return reshaped(traced.of(x), output.shape)


def _transpose(traced: TracedTensors, output: Tensor, x: Tensor, first: int, second: int) -> Axes:
    axes = list(traced.of(x))
    axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


def _permute(traced: TracedTensors, output: Tensor, x: Tensor, *dims: Any) -> Axes:
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    axes = traced.of(x)
    return tuple(axes[place] for place in order)


def _t(traced: TracedTensors, output: Tensor, x: Tensor) -> Axes:
    return tuple(reversed(traced.of(x)))


def _pad(
    traced: TracedTensors,
    output: Tensor,
    x: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    *args: Any,
    **named: Any,
) -> Axes | None:
    axes = list(traced.of(x))
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        axis = axes[-number]
        if min(before, after) < 0 or (mode != "constant" and not is_fixed(axis)):
            return None
        if is_fixed(axis):
            axes[-number] = np.zeros(len(axis) + before + after, dtype=np.int64)
        else:  # constant channels may trade places
            axes[-number] = np.concatenate([traced.table.fresh(before), axis, traced.table.fresh(after)])
    return tuple(axes)


def _cat(traced: TracedTensors, output: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Axes:
    parts = [list(traced.of(tensor)) for tensor in tensors]
    joined = np.concatenate([part[dim] for part in parts])
    first, *others = parts
    for part in others:
        for place, axis in enumerate(part):
            if place != dim % len(part):
                traced.table.merge(first[place], axis)
    first[dim] = joined
    return tuple(first)


def _getitem(traced: TracedTensors, output: Tensor, x: Tensor, index: Any) -> Axes | None:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, (int, slice, type(None), type(Ellipsis))) for part in parts):
        return None
    left = x.dim() - sum(isinstance(part, (int, slice)) for part in parts)
    expanded: list[Any] = []
    for part in parts if Ellipsis in parts else (*parts, Ellipsis):
        expanded += [slice(None)] * left if part is Ellipsis else [part]
    axes, found = iter(traced.of(x)), []
    for part in expanded:
        if part is None:
            found.append(np.zeros(1, dtype=np.int64))
            continue
        axis = next(axes)
        if isinstance(part, int):
            if not is_fixed(axis):
                return None
        else:
            found.append(axis[part])
    return tuple(found)


RULES: dict[str, Rule] = {
    "linear": _linear,
    "embedding": _embedding,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "prelu": _prelu,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    "permute": _permute,
    "t": _t,
    "pad": _pad,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "getitem": _getitem,
}
"""Rules by the name of the function, without underscores at its ends."""
