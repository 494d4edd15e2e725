"""Planes of a loss landscape by loss-landscapes and Landscaper, used as in their documentation.

    uv pip install --target FOLDER --no-deps loss-landscapes landscaper

Each library draws and scales directions differently, so the planes differ. The number of points, the model, the samples
and the loss are the same, and so is the work.
"""

import contextlib
import importlib
import importlib.metadata
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PEERS", "versions"]

Batch = tuple[Tensor, Tensor]


def versions() -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions of the peers that can be imported, and the import errors of the others."""
    found, missing = {}, {}
    for peer, distribution in (("loss_landscapes", "loss-landscapes"), ("landscaper", "landscaper")):
        try:
            importlib.import_module(peer)
            found[peer] = importlib.metadata.version(distribution)
        except ImportError as error:
            missing[peer] = str(error)
    return found, missing


def loss_landscapes(model: nn.Module, batch: Batch, side: int) -> Tensor:
    """Compute a filter-normalized random plane without a copy of the model, so the library leaves the weights moved."""
    library = importlib.import_module("loss_landscapes")
    metrics = importlib.import_module("loss_landscapes.metrics")
    with torch.no_grad():
        losses = library.random_plane(model, metrics.Loss(F.cross_entropy, *batch), steps=side, normalization="filter")
    return torch.as_tensor(losses, dtype=torch.float64)


def landscaper(model: nn.Module, batch: Batch, side: int) -> Tensor:
    """Compute a plane of random directions, scaled for each parameter."""
    library = importlib.import_module("landscaper.compute")
    directions = [[torch.randn_like(p) for p in model.parameters()] for _ in range(2)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        losses, _ = library.compute_loss_landscape(
            model,
            batch,
            directions,
            lambda network, data: F.cross_entropy(network(data[0]), data[1]).item(),
            steps=side,
            distance=0.1,
            dim=2,
            device="cpu",
        )
    return torch.as_tensor(losses, dtype=torch.float64)


PEERS: dict[str, Callable[[nn.Module, Batch, int], Tensor]] = {
    "loss_landscapes": loss_landscapes,
    "landscaper": landscaper,
}
