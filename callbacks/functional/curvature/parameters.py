"""The parameters that an analysis differentiates by."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.parameters import trainable_parameters

__all__ = ["selected_parameters"]


def selected_parameters(model: nn.Module, params: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """``params``, or all parameters that require a gradient, by name and in the order of the model.

    Raises:
        ValueError: If there are none, or they do not fit into one vector of float32 or float64.
    """
    chosen: dict[str, Tensor] = {**trainable_parameters(model)}
    if params is not None:
        wanted = {id(p) for p in params}
        chosen = {name: p for name, p in chosen.items() if id(p) in wanted}
        if not wanted or len(chosen) < len(wanted):
            raise ValueError(
                f"params: expected parameters of the model that require a gradient; "
                f"{len(wanted) - len(chosen)} of {len(wanted)} are not"
            )
    kinds = {(p.dtype, p.device) for p in chosen.values()}
    if len(kinds) > 1 or next(iter(kinds))[0] not in {torch.float32, torch.float64}:
        found = sorted(f"{dtype} on {device}" for dtype, device in kinds)
        raise ValueError(
            f"model: expected parameters all float32 or all float64, on one device; got {found}; "
            "analyse a copy, callback.analyse(copy.deepcopy(model).float(), ...)"
        )
    return chosen
