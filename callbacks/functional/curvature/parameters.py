"""The parameters that an analysis differentiates by."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.parameters import trainable_parameters

__all__ = ["Selection", "selected_parameters", "slices_of"]

Selection = Sequence[Tensor | str]
"""Parameters of a model: tensors, names of parameters, or names of modules, which stand for all their parameters."""


def selected_parameters(model: nn.Module, params: Selection | None) -> dict[str, Tensor]:
    """``params``, or all parameters that require a gradient, by name and in the order of the model.

    Raises:
        ValueError: If there are none, one of them is not a parameter that requires a gradient or not finite, or they do
            not fit into one vector of float32 or float64.
    """
    trainable: dict[str, Tensor] = {**trainable_parameters(model)}
    chosen = trainable if params is None else _chosen(model, trainable, params)
    broken = [name for name, p in chosen.items() if not bool(p.detach().isfinite().all())]
    if broken:
        raise ValueError(f"model: expected finite parameters; {broken[0]!r} holds nan or inf: did training diverge?")
    kinds = {(p.dtype, p.device) for p in chosen.values()}
    if len(kinds) > 1 or next(iter(kinds))[0] not in {torch.float32, torch.float64}:
        found = sorted(f"{dtype} on {device}" for dtype, device in kinds)
        raise ValueError(
            f"model: expected parameters all float32 or all float64, on one device; got {found}; "
            "analyse a copy, callback.analyse(copy.deepcopy(model).float(), ...)"
        )
    return chosen


def slices_of(named: Mapping[str, Tensor]) -> dict[str, slice]:
    """Place of each parameter in the flat vector of all of them."""
    ends = list(accumulate(p.numel() for p in named.values()))
    return {name: slice(end - p.numel(), end) for (name, p), end in zip(named.items(), ends, strict=True)}


def _chosen(model: nn.Module, trainable: dict[str, Tensor], params: Selection) -> dict[str, Tensor]:
    if isinstance(params, (str, Tensor)) or not isinstance(params, Iterable):
        raise ValueError(f"params: expected a list of parameters or of their names; got {_described(params)}")
    first_names = {id(p): name for name, p in trainable.items()}
    # a shared parameter may be meant by any of its names
    known = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in first_names]
    names: set[str] = set()
    for entry in params:
        found = {first_names[id(p)] for name, p in known if _is_meant(entry, name, p)}
        if not found:
            raise ValueError(
                "params: expected parameters of the model that require a gradient, or names of parameters or modules "
                f"such as {next(iter(trainable))!r}; {_described(entry)} is none"
            )
        names |= found
    if not names:
        raise ValueError("params: expected at least one parameter; got none")
    return {name: p for name, p in trainable.items() if name in names}


def _is_meant(entry: Tensor | str, name: str, parameter: Tensor) -> bool:
    if isinstance(entry, str):
        return name == entry or name.startswith(f"{entry}.")
    return parameter is entry


def _described(entry: object) -> str:
    return f"a tensor of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else repr(entry)
