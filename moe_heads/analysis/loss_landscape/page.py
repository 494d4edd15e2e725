"""A loss landscape as one HTML file to turn and to read, which needs neither network nor server."""

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from moe_heads.analysis.loss_landscape.result import LossLandscapeResult

__all__ = ["landscape_page"]

# What is offered before the flips, in this order, by its name on the page.
_QUANTITIES = {
    "loss": "losses",
    "loss, routing held fixed": "losses_fixed_routing",
    "accuracy": "accuracies",
}


def landscape_page(cuts: "Mapping[str, LossLandscapeResult]", title: str = "Loss landscape") -> str:
    """HTML with all cuts: lines as curves, planes as surfaces that turn, every value under the pointer.

    Script, style and data are in the file. A value that is not finite is left out of the picture.

    Args:
        cuts: Landscapes by name; at least one.
        title: Heading.

    Raises:
        ValueError: If there is none.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import landscape_page, loss_landscape
        >>> model = torch.nn.Linear(1, 1)
        >>> line = loss_landscape(
        ...     model, lambda m, batch: m(batch).square().mean(), [torch.ones(1, 1)], direction1=torch.ones(2)
        ... )
        >>> "<canvas" in landscape_page({"line": line})
        True
    """
    if not cuts:
        raise ValueError("cuts: expected at least one landscape, got none")
    data = {"title": title, "cuts": {name: _data_of(cut) for name, cut in cuts.items()}}
    # a name with "</script>" in it would end the block
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return (files(__package__) / "page.html").read_text(encoding="utf-8").replace("__DATA__", text)


def _data_of(cut: "LossLandscapeResult") -> dict[str, Any]:
    there = {name: getattr(cut, field) for name, field in _QUANTITIES.items()} | {cut.flip: cut.routing_flips}
    path = cut.trajectory
    return {
        "alphas": cut.alphas.tolist(),
        "betas": None if cut.betas is None else cut.betas.tolist(),
        "is_log": cut.scale == "log",
        "quantities": {name: _plain(values) for name, values in there.items() if values is not None},
        "trajectory": None
        if path is None
        else {
            "coordinates": path.coordinates.tolist(),
            "residuals": path.residuals.tolist(),
            "labels": list(path.labels),
        },
    }


def _plain(values: Tensor) -> list[Any]:
    """Nested lists with None for what JSON has no number for."""
    if values.dim() > 1:
        return [_plain(row) for row in values]
    return [value if math.isfinite(value) else None for value in values.tolist()]
