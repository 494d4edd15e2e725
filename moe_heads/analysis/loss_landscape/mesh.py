"""A loss surface as a triangle mesh for TensorBoard."""

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["surface_mesh", "triangles"]

# TensorBoard's viewer holds the indices of a face in 16 bits.
_MAX_VERTICES = 2**16
# Height of the surface, where its base is 2 × 2.
_HEIGHT = 1.0


def surface_mesh(
    alphas: Tensor, betas: Tensor, losses: Tensor, *, scale: Literal["linear", "log"] = "linear", tilt: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Vertices, faces and colors of the surface; V vertices, F faces, one mesh.

    Before the tilt x is α and y is β, each stretched to [-1, 1], and z is the loss or its logarithm, stretched to
    [0, 1]: the lowest point is at 0, the highest at 1. Every triangle appears once, its normal upwards (z > 0). Points
    without a finite loss, and the triangles that would touch one, are left out.

    Args:
        alphas: (A,), increasing.
        betas: (B,), increasing.
        losses: (A, B).
        scale: "log" for the logarithm; all finite losses must be positive.
        tilt: Degrees by which the surface is turned about the x axis, its far edge (large β) away from the viewer, who
            looks along -z with y up.

    Returns:
        vertices, (1, V, 3), float32; faces, (1, F, 3), int64; colors (viridis, by height), (1, V, 3), uint8.

    Raises:
        ValueError: If no triangle is left, or more than 65,536 vertices, which the viewer cannot address.
    """
    from matplotlib import colormaps

    finite = losses.isfinite()
    faces = triangles(finite)
    if not len(faces) or int(finite.sum()) > _MAX_VERTICES:
        raise ValueError(
            f"losses: expected neighboring finite points, {_MAX_VERTICES} at most, got {int(finite.sum())} "
            f"finite points of {losses.numel()}, with {len(faces)} triangles"
        )
    heights = losses[finite].log() if scale == "log" else losses[finite]
    heights = _stretched(heights)
    grid = torch.meshgrid(2 * _stretched(alphas) - 1, 2 * _stretched(betas) - 1, indexing="ij")
    x, y, z = grid[0][finite], grid[1][finite], _HEIGHT * heights
    cosine, sine = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    vertices = torch.stack([x, cosine * y + sine * z, cosine * z - sine * y], dim=-1)
    colors = torch.from_numpy(colormaps["viridis"](heights.numpy(), bytes=True)[:, :3].copy())
    return vertices.float()[None], faces[None], colors[None]


def triangles(finite: Tensor) -> Tensor:
    """Two triangles a cell, counter-clockwise seen from above, over the finite points numbered row by row, (F, 3)."""
    number = torch.full(finite.shape, -1)
    number[finite] = torch.arange(int(finite.sum()))
    corner, right, up, across = number[:-1, :-1], number[1:, :-1], number[:-1, 1:], number[1:, 1:]
    halves = [torch.stack([corner, right, across], -1), torch.stack([corner, across, up], -1)]
    faces = torch.cat([half.reshape(-1, 3) for half in halves])
    return faces[(faces >= 0).all(1)]


def _stretched(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
