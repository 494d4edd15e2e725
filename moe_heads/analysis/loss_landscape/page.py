"""Interactive HTML page of a loss landscape in one file, which needs neither a network nor a server."""

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from moe_heads.analysis.loss_landscape.result import LossLandscapeResult

__all__ = ["landscape_page"]

# Quantities listed before the flips, by their name on the page.
_QUANTITIES = {
    "loss": "losses",
    "loss at fixed routing": "losses_fixed_routing",
    "accuracy": "accuracies",
}


def landscape_page(cuts: "Mapping[str, LossLandscapeResult]", title: str = "Loss landscape") -> str:
    """Return an HTML page with all cuts: lines as curves, planes as rotatable surfaces, values under the pointer.

    The file includes script, style and data. Values that are not finite are not drawn.

    Args:
        cuts: Landscapes by name, at least one.
        title: Title.

    Raises:
        ValueError: If there are none.

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
        raise ValueError("cuts: expected at least one landscape, got none.")
    data = {"title": title, "cuts": {name: _data_of(cut) for name, cut in cuts.items()}}
    # a name that contains "</script>" would end the block
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return (files(__package__) / "page.html").read_text(encoding="utf-8").replace("__DATA__", text)


def _data_of(cut: "LossLandscapeResult") -> dict[str, Any]:
    quantities = {name: getattr(cut, field) for name, field in _QUANTITIES.items()} | {cut.flip: cut.routing_flips}
    path = cut.trajectory
    return {
        "alphas": cut.alphas.tolist(),
        "betas": None if cut.betas is None else cut.betas.tolist(),
        "is_log": cut.scale == "log",
        "quantities": {name: _plain(values) for name, values in quantities.items() if values is not None},
        "trajectory": None
        if path is None
        else {
            "coordinates": path.coordinates.tolist(),
            "residuals": path.residuals.tolist(),
            "labels": list(path.labels),
        },
    }


def _plain(values: Tensor) -> list[Any]:
    """Return nested lists with None for nan and inf, which JSON does not have."""
    if values.dim() > 1:
        return [_plain(row) for row in values]
    return [value if math.isfinite(value) else None for value in values.tolist()]
