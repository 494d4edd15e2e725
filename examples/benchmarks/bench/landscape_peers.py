"""A plane of a loss landscape by loss-landscapes and by Landscaper, as their documentation uses them.

    uv pip install --target FOLDER --no-deps loss-landscapes landscaper

Both draw and scale directions in a way of their own, so the planes differ; the points, the model, the samples and the
loss are the same, and so is the work.
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
    """Versions of the peers that can be imported, and why the others cannot."""
    found, missing = {}, {}
    for peer, distribution in (("loss_landscapes", "loss-landscapes"), ("landscaper", "landscaper")):
        try:
            importlib.import_module(peer)
            found[peer] = importlib.metadata.version(distribution)
        except ImportError as error:
            missing[peer] = str(error)
    return found, missing


def loss_landscapes(model: nn.Module, batch: Batch, side: int) -> Tensor:
    """Filter-normalized random plane; without its copy of the model, which leaves the weights moved."""
    library = importlib.import_module("loss_landscapes")
    metrics = importlib.import_module("loss_landscapes.metrics")
    with torch.no_grad():
        losses = library.random_plane(model, metrics.Loss(F.cross_entropy, *batch), steps=side, normalization="filter")
    return torch.as_tensor(losses, dtype=torch.float64)


def landscaper(model: nn.Module, batch: Batch, side: int) -> Tensor:
    """Random directions, scaled parameter by parameter."""
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
