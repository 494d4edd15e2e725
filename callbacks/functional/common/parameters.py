"""The parameters that an analysis differentiates by or moves, and their order in a flat vector."""

from torch import nn

__all__ = ["trainable_parameters"]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient by name, shared ones once, in the order of every flat vector (P,).

    Raises:
        ValueError: If there are none, or one of them is lazy.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("model: expected at least one parameter that requires a gradient; got none")
    lazy = [name for name, p in named.items() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise ValueError(f"model: expected initialised parameters; {lazy[0]} is lazy: run one forward pass first")
    return named
