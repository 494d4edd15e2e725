"""Selection of the parameters that an analysis differentiates or moves, and their order in a flat vector."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.shards import reshard

__all__ = ["Selection", "check_real", "trainable_parameters"]

Selection = Sequence[Tensor | str]
"""Parameters of a model: tensors, names of parameters, or names of modules, which select all their parameters."""


def trainable_parameters(
    model: nn.Module, params: Selection | None = None, *, only_real: bool = True
) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient by name, in the order of every flat vector (P,).

    A shared parameter occurs once.

    Args:
        model: The model.
        params: The selected parameters; by default all.
        only_real: Whether complex parameters raise an error, since they do not fit into a flat vector.

    Raises:
        ValueError: If there is none, one of them is lazy or complex, or an entry of ``params`` matches none of them.
    """
    check_arguments(model=model)
    reshard(model)  # otherwise the parameters may be those that the last pass gathered
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("model: expected at least one parameter that requires a gradient, got none.")
    lazy = [name for name, p in named.items() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise ValueError(f"model: expected initialized parameters, got a lazy {lazy[0]!r}. Run one forward pass first.")
    chosen = named if params is None else _chosen(model, named, params)
    if only_real:
        check_real(chosen)
    return chosen


def check_real(chosen: Mapping[str, Tensor]) -> None:
    """Raise an error if a parameter is complex.

    Raises:
        ValueError: If a parameter is complex.
    """
    found = {name: p for name, p in chosen.items() if p.is_complex()}
    if not found:
        return
    name, parameter = next(iter(found.items()))
    real = next((name for name in chosen if name not in found), None)
    others = "" if real is None else f", or choose real ones, such as params=[{real!r}]"
    raise ValueError(
        f"model: expected real parameters, got {name!r} of type {parameter.dtype}. Complex parameters are not"
        " supported. Store the real and imaginary parts as a real parameter and use torch.view_as_complex in"
        f" forward{others}."
    )


def _chosen(model: nn.Module, trainable: dict[str, nn.Parameter], params: Selection) -> dict[str, nn.Parameter]:
    if isinstance(params, (str, Tensor)) or not isinstance(params, Iterable):
        raise ValueError(f"params: expected a list of parameters or of their names, got {_described(params)}.")
    first_names = {id(p): name for name, p in trainable.items()}
    # a shared parameter may be selected by any of its names
    known = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in first_names]
    names: set[str] = set()
    for entry in params:
        found = {first_names[id(p)] for name, p in known if _is_meant(entry, name, p)}
        if not found:
            raise ValueError(
                "params: expected parameters of the model that require a gradient, or names of parameters or modules "
                f"such as {next(iter(trainable))!r}, got {_described(entry)}."
            )
        names |= found
    if not names:
        raise ValueError("params: expected at least one parameter, got none.")
    return {name: p for name, p in trainable.items() if name in names}


def _is_meant(entry: Tensor | str, name: str, parameter: Tensor) -> bool:
    if isinstance(entry, str):
        return name == entry or name.startswith(f"{entry}.")
    return parameter is entry


def _described(entry: object) -> str:
    return f"a tensor of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else repr(entry)
