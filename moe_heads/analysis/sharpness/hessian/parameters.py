"""Selection of the parameters to differentiate by."""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.parameters import Selection, trainable_parameters
from moe_heads.analysis._shared.shards import check_whole, local

__all__ = ["Selection", "check_types", "selected_parameters", "slices_of"]

_TYPES = {torch.float32, torch.float64}


def selected_parameters(
    model: nn.Module, params: Selection | None, *, allows_shards: bool = False
) -> dict[str, Tensor]:
    """Return ``params``, or all parameters that require a gradient, by name and in the order of the model.

    Args:
        model: The model.
        params: The selected parameters.
        allows_shards: Whether parameters may be divided among processes. torch.autograd.grad knows none of these.

    Raises:
        ValueError: If there are none, one of them is not a parameter that requires a gradient or not finite, they do
            not fit into one vector of float32 or float64, or one of them is sharded.
    """
    chosen: dict[str, Tensor] = {**trainable_parameters(model, params)}
    if not allows_shards:
        check_whole(chosen, model)
    broken = [name for name, p in chosen.items() if not bool(local(p.detach()).isfinite().all())]
    if broken:
        raise ValueError(
            f"model: expected finite parameters, got nan or inf in {broken[0]!r}. Check whether training diverged."
        )
    check_types(chosen)
    return chosen


def check_types(chosen: Mapping[str, Tensor]) -> None:
    """Check that parameters fit into one vector of float32 or float64.

    Raises:
        ValueError: If they do not. The message names the types, and a parameter in half precision.
    """
    kinds = {(p.dtype, p.device) for p in chosen.values()}
    if len(kinds) == 1 and next(iter(kinds))[0] in _TYPES:
        return
    found = sorted(f"{dtype} on {device}" for dtype, device in kinds)
    other = next((name for name, p in chosen.items() if p.dtype not in _TYPES), None)
    remedy = "Analyze a copy of one type, callback.analyze(copy.deepcopy(model).float(), ...)"
    if other is not None:
        remedy = (
            f"{other!r} is in half precision: freeze it (requires_grad_(False)), choose the parameters in full"
            ' precision with params=[...], train with precision="bf16-mixed", which keeps them in float32, or analyze'
            " a copy, callback.analyze(copy.deepcopy(model).float(), ...)"
        )
    raise ValueError(f"model: expected parameters all float32 or all float64, on one device, got {found}. {remedy}.")


def slices_of(named: Mapping[str, Tensor]) -> dict[str, slice]:
    """Return the place of each parameter in the flat vector of all of them."""
    ends = list(accumulate(p.numel() for p in named.values()))
    return {name: slice(end - p.numel(), end) for (name, p), end in zip(named.items(), ends, strict=True)}
