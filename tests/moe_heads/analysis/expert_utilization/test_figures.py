"""Figures of one head, also of 128 experts."""

from itertools import pairwise

import pytest
import torch

from moe_heads import Routing, RoutingStats
from moe_heads.analysis.expert_utilization.figures import plot_coactivation, plot_load, plot_load_history
from tests.support.utilizations import head_of


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


def test_128_experts_over_ten_epochs_have_rows_of_several_pixels() -> None:
    figure, ax = plot_load_history({number: epoch([2] * 128) for number in range(10)})
    figure.canvas.draw()
    assert ax.get_window_extent().height / 128 >= 4
    assert len(ax.get_yticks()) == 16
    assert len(ax.images) == 1


def test_sixteen_experts_have_sixteen_colors() -> None:
    _, ax = plot_load_history({0: epoch([1] * 16)})
    assert len({bar.get_facecolor() for bar in ax.patches}) == 16
    assert ax.get_xlim() == (-0.5, 0.5)


def test_bars_of_128_experts_touch_and_dead_ones_have_a_marker() -> None:
    head = head_of([1.0] * 120 + [0.0] * 8)
    figure, ax = plot_load("layers.0", head)
    figure.canvas.draw()
    assert len(ax.patches) == 128
    assert {bar.get_width() for bar in ax.patches} == {1.0}
    assert ax.get_window_extent().width / 128 >= 4
    markers = {line.get_label(): list(line.get_xdata()) for line in ax.get_lines()}
    assert markers["dead"] == list(range(120, 128))
    assert "importance" in markers
    assert not ax.texts
    assert len(ax.get_xticks()) == 16


def test_labels_of_a_map_of_128_experts_do_not_overlap() -> None:
    figure, ax = plot_coactivation("layers.0", torch.rand(128, 128, dtype=torch.float64))
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert all(below.y1 < above.y0 for above, below in pairwise(boxes))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("also expert", "rows of expert")
