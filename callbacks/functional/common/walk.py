"""Move the parameters of a model along directions."""

from collections.abc import Sequence

from torch import Tensor, nn

from moe_heads.callbacks.functional.common.contents import write_back
from moe_heads.callbacks.functional.common.parameters import trainable_parameters

__all__ = ["Walk"]


class Walk:
    """Moves the parameters in place; `analysis_mode` brings them back. Shared parameters move once.

    Args:
        model: The model.
        directions: Part of each parameter by its name, for each direction.
    """

    def __init__(self, model: nn.Module, directions: Sequence[dict[str, Tensor]]) -> None:
        named = trainable_parameters(model)
        self._moves = [(p, p.detach().clone(), [d[name] for d in directions]) for name, p in named.items()]

    def go(self, coordinates: Sequence[float]) -> None:
        """Move to the start plus the sum of the directions times their coordinates."""
        # always from the start, never from the last point: rounding errors do not add up
        for parameter, start, steps in self._moves:
            place = start.clone()
            for coordinate, step in zip(coordinates, steps, strict=True):
                place.add_(step, alpha=coordinate)
            write_back(parameter, place)
