import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_heads.analysis import LossLandscapeResult, plot_lines


def landscape(losses: Tensor, fixed: Tensor | None = None) -> LossLandscapeResult:
    axes = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in losses.shape]
    return LossLandscapeResult(
        alphas=axes[0],
        betas=axes[1] if len(axes) > 1 else None,
        losses=losses.double(),
        accuracies=None,
        routing_flips=None,
        center_loss=1.0,
        center_accuracy=None,
        num_samples=8,
        seed=0,
        losses_fixed_routing=fixed,
    )


def test_lines_of_several_models_in_one_figure() -> None:
    sparse = landscape(torch.tensor([2.0, 1.0, math.inf]), torch.tensor([1.5, 1.0, 2.0]))
    figure, ax = plot_lines({"dense": landscape(torch.tensor([3.0, 1.0, 3.0])), "sparse": sparse})
    figure.canvas.draw()
    assert ax.get_legend_handles_labels()[1] == ["dense", "sparse"]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "-", "--"]
    assert np.array_equal(ax.lines[1].get_ydata(), [1, 0, math.nan], equal_nan=True)


def test_no_line() -> None:
    with pytest.raises(ValueError, match="results: expected landscapes along a line, got none"):
        plot_lines({})
    with pytest.raises(ValueError, match="results: expected landscapes along a line, got a plane"):
        plot_lines({"plane": landscape(torch.ones(3, 3))})
