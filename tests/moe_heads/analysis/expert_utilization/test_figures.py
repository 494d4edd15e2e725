"""Figure of the load over the epochs."""

import pytest
import torch

from moe_heads import Routing, RoutingStats
from moe_heads.analysis.expert_utilization.figures import plot_load_history


def epoch(counts: list[int]) -> RoutingStats:
    logits = 50 * torch.eye(len(counts))[torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))]
    return Routing(logits=logits, probs=logits.softmax(-1)).stats()


def test_bars_of_an_epoch_stack_up_to_one() -> None:
    figure, ax = plot_load_history({0: epoch([1, 3]), 1: epoch([4, 0])})
    figure.canvas.draw()
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx([0.25, 1.0, 0.75, 0.0])
    assert [bar.get_y() for bar in ax.patches] == pytest.approx([0.0, 0.0, 0.25, 1.0])


def test_many_experts_are_rows_of_a_map() -> None:
    figure, ax = plot_load_history({3: epoch([2] * 20), 5: epoch([40] + [0] * 19)})
    figure.canvas.draw()
    (image,) = ax.images
    assert image.get_array().shape == (20, 3)
    assert image.get_array()[:, 1].mask.all()  # epoch 4 is not known
    assert image.get_extent()[:2] == [2.5, 5.5]
    assert image.get_array()[:, 0].tolist() == pytest.approx([1.0] * 20)
    assert image.get_array()[:2, 2].tolist() == pytest.approx([20.0, 0.0])
