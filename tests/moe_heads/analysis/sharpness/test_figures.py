import io

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from moe_heads.analysis.sharpness.block import BlockCurvature
from moe_heads.analysis.sharpness.figures import plot_blocks, plot_history, plot_spectrum
from moe_heads.analysis.sharpness.hessian.density import SpectralDensity, density_of, spectral_density
from moe_heads.analysis.sharpness.hessian.lanczos import lanczos
from tests.support.hessians import DenseOperator, symmetric


@pytest.fixture
def density() -> SpectralDensity:
    operator = DenseOperator(symmetric(torch.randn(60)))
    return spectral_density([lanczos(operator, generator=torch.Generator().manual_seed(0), min_steps=20)])


def test_log_density_with_marks(density: SpectralDensity) -> None:
    figure, ax = plot_spectrum([3.0, 2.0], density)
    curve, marks = ax.lines
    assert ax.get_yscale() == "log" and len(curve.get_xdata()) == 1024
    assert float(curve.get_ydata().max()) == pytest.approx(float(density.values.max()))
    assert list(marks.get_xdata()) == [3.0, 2.0]
    peaks = density.values[torch.cdist(density.nodes[:, None], density.grid[:, None]).argmin(1)]
    assert ax.get_ylim()[0] < float(peaks.min())
    figure.savefig(io.BytesIO())


def test_without_density_only_the_marks() -> None:
    figure, ax = plot_spectrum([3.0, 2.0], None)
    assert len(ax.lines) == 1 and ax.get_yscale() == "linear"
    figure.savefig(io.BytesIO())


def test_given_axes_are_used_and_pyplot_is_not(density: SpectralDensity) -> None:
    left, right = Figure().subplots(1, 2)
    figure, ax = plot_spectrum([3.0], density, right)
    assert ax is right and figure is left.figure and not left.lines
    plot_spectrum([3.0], density)
    assert plt.get_fignums() == []


def block(trace: float, stderr: float, *shares: float) -> BlockCurvature:
    return BlockCurvature(10, shares, trace, stderr)


def test_blocks_and_experts_have_axes_of_their_own() -> None:
    blocks = {"backbone": block(100, 2, 0.9, 0.7), "experts": block(3, 0.5, 0.1, 0.3)}
    experts = {"expert 0": block(1, 0.1, 0.1, 0.1), "expert 1": block(float("nan"), float("inf"), 0.0, 0.2)}
    upper, lower, right = plot_blocks(blocks, experts).axes
    assert [bar.get_width() for bar in upper.patches] == [100, 3]
    assert [bar.get_width() for bar in lower.patches] == [1, 0]
    assert [label.get_text() for label in lower.get_yticklabels()] == ["expert 0", "expert 1"]
    # the shares of an eigenvector stand on each other
    assert [bar.get_height() for bar in right.patches] == pytest.approx([0.9, 0.7, 0.1, 0.3])
    assert [bar.get_y() for bar in right.patches] == [0, 0, 0.9, 0.7]
    assert len(plot_blocks(blocks, {}).axes) == 2


def test_history_with_a_threshold_that_is_known_later() -> None:
    (ax,) = plot_history({0: (3.0, None), 1: (5.0, 20.0)}).axes
    values, threshold = ax.lines
    assert list(values.get_ydata()) == [3.0, 5.0] and list(threshold.get_ydata())[1] == 20.0
    (ax,) = plot_history({0: (-3.0, None)}).axes
    assert len(ax.lines) == 1 and ax.get_yscale() == "linear"


def test_the_density_fills_its_figure() -> None:
    nodes = torch.tensor([0.0, 110.0], dtype=torch.float64)
    weights = torch.tensor([1 - 1e-6, 1e-6], dtype=torch.float64)
    density = density_of(nodes, weights, 1000)
    ax = plot_spectrum((110.0,), density)[1]
    bottom, top = ax.get_ylim()
    peak = float(density.values.max())
    assert peak < top <= 4 * peak and bottom < 1e-6 * peak
