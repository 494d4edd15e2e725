import io

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from moe_heads.callbacks.functional.curvature.density import SpectralDensity, spectral_density
from moe_heads.callbacks.functional.curvature.lanczos import lanczos
from moe_heads.callbacks.functional.spectrum.figure import plot_spectrum
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
