import math

import pytest
import torch
from torch import Tensor

from moe_heads.analysis.loss_landscape.figures import surface_mesh

ALPHAS = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
BETAS = torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
LOSSES = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1


def normals(vertices: Tensor, faces: Tensor) -> Tensor:
    a, b, c = vertices[0][faces[0]].unbind(1)
    return torch.linalg.cross(b - a, c - a)


def test_each_cell_has_two_triangles_with_upward_normals_that_cover_the_base_once() -> None:
    vertices, faces, colors = surface_mesh(ALPHAS, BETAS, LOSSES)
    assert (vertices.shape, faces.shape, colors.shape) == ((1, 12, 3), (1, 12, 3), (1, 12, 3))
    assert (vertices.dtype, colors.dtype) == (torch.float32, torch.uint8)
    up = normals(vertices, faces)[:, 2]
    assert (up > 0).all()
    assert up.sum() / 2 == pytest.approx(4.0)  # area of the base, 2 × 2
    assert faces[0].sort(1).values.unique(dim=0).shape == (12, 3)


def test_heights_and_base_are_scaled() -> None:
    vertices, _, colors = surface_mesh(ALPHAS, BETAS, LOSSES)
    x, y, z = vertices[0].double().reshape(3, 4, 3).unbind(-1)
    torch.testing.assert_close(x[:, 0], torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(y[0], torch.tensor([-1.0, -0.5, 0.0, 1.0], dtype=torch.float64))
    expected = (LOSSES - LOSSES.min()) / (LOSSES.max() - LOSSES.min())
    torch.testing.assert_close(z, expected, atol=1e-6, rtol=0)
    lowest, highest = int(LOSSES.argmin()), int(LOSSES.argmax())
    assert colors[0, lowest].tolist() == [68, 1, 84]  # the ends of viridis
    assert colors[0, highest].tolist() == [253, 231, 36]


def test_log_scale() -> None:
    losses = torch.tensor([[1.0, 10.0], [100.0, 10000.0]], dtype=torch.float64)
    vertices, _, _ = surface_mesh(ALPHAS[:2], BETAS[:2], losses, scale="log")
    torch.testing.assert_close(vertices[0, :, 2], torch.tensor([0.0, 0.25, 0.5, 1.0]))


def test_nonfinite_points_are_omitted_with_their_triangles() -> None:
    losses = LOSSES.clone()
    losses[0, 0], losses[2, 3] = math.nan, math.inf
    vertices, faces, colors = surface_mesh(ALPHAS, BETAS, losses)
    assert vertices.shape == colors.shape == (1, 10, 3)
    assert vertices.isfinite().all()
    assert int(faces.max()) == 9
    # the two corners lie on the diagonal of their cell: both triangles go
    assert faces.shape == (1, 8, 3)
    assert (normals(vertices, faces)[:, 2] > 0).all()


def test_tilt_rotates_the_surface_and_moves_its_far_edge_away() -> None:
    flat, _, _ = surface_mesh(ALPHAS, BETAS, LOSSES)
    tilted, _, _ = surface_mesh(ALPHAS, BETAS, LOSSES, tilt=90.0)
    x, y, z = flat[0].unbind(-1)
    torch.testing.assert_close(tilted[0], torch.stack([x, z, -y], -1))


def test_a_flat_surface() -> None:
    vertices, _, _ = surface_mesh(ALPHAS, BETAS, torch.ones_like(LOSSES))
    assert not vertices[0, :, 2].any()


def test_no_finite_points() -> None:
    with pytest.raises(ValueError, match=r"losses: expected neighboring finite points, 65536 at most, got 0 finite"):
        surface_mesh(ALPHAS, BETAS, torch.full_like(LOSSES, math.nan))


def test_more_vertices_than_the_viewer_can_address() -> None:
    side = torch.linspace(0, 1, 257)
    with pytest.raises(ValueError, match="65536 at most, got 66049 finite"):
        surface_mesh(side, side, torch.ones(257, 257))


def test_tensorboard_accepts_the_mesh(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    vertices, faces, colors = surface_mesh(ALPHAS, BETAS, LOSSES)
    with SummaryWriter(tmp_path) as writer:
        writer.add_mesh("surface", vertices, colors=colors, faces=faces)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Tags()["tensors"]) == 3
