"""The parameters that an analysis differentiates by."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["selected_parameters"]


def selected_parameters(model: nn.Module, params: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """``params``, or all parameters that require a gradient, by name and in the order of the model.

    Raises:
        ValueError: If there are none, or they do not fit into one vector of float32 or float64.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen: dict[str, Tensor] = {name: p for name, p in named.items() if p.requires_grad}
    else:
        wanted = {id(p) for p in params}
        chosen = {name: p for name, p in named.items() if id(p) in wanted}
        if len(chosen) != len(wanted) or not all(p.requires_grad for p in chosen.values()):
            raise ValueError(
                f"params: expected parameters of the model that require a gradient; "
                f"{len(wanted) - sum(p.requires_grad for p in chosen.values())} of {len(wanted)} are not"
            )
    if not chosen:
        raise ValueError("model: expected at least one parameter that requires a gradient; got none")
    _check(chosen)
    return chosen


def _check(named: dict[str, Tensor]) -> None:
    lazy = [name for name, p in named.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(f"model: expected initialised parameters; {lazy[0]} is lazy: run one forward pass first")
    kinds = {(p.dtype, p.device) for p in named.values()}
    if len(kinds) > 1 or next(iter(kinds))[0] not in {torch.float32, torch.float64}:
        found = sorted(f"{dtype} on {device}" for dtype, device in kinds)
        raise ValueError(f"model: expected parameters all float32 or all float64, on one device; got {found}")
