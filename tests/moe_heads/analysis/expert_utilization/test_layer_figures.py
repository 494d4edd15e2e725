"""Maps of many layers."""

import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from moe_heads.analysis.expert_utilization.layer_figures import plot_dead_by_epoch, plot_load_by_layer
from moe_heads.analysis.expert_utilization.layers import Layer
from tests.support.utilizations import head_of, heads_of


def draw(figure: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig("/dev/null", format="png")


def test_every_expert_of_48_layers_has_a_cell_of_several_pixels() -> None:
    layers = {name: Layer.of_head(head) for name, head in heads_of(48, 128).items()}
    figure, ax = plot_load_by_layer(layers)
    draw(figure)
    shares = ax.images[0].get_array()
    for row, layer in enumerate(layers.values()):
        expected = [-1 if e in layer.dead else value for e, value in enumerate(layer.relative.tolist())]
        np.testing.assert_allclose(shares[row], expected)
    assert ax.get_title() == "48 layers, 9 dead experts (red)"
    box = ax.get_window_extent()
    assert box.width / 128 >= 4
    assert box.height / 48 >= 8
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert (labels, ax.get_ylabel()) == ([str(layer) for layer in range(48)], "model.layers.*.mlp.gate")
    heights = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert all(below.y1 <= above.y0 + 1 for above, below in pairwise(heights))
    assert len(ax.get_xticks()) == 16


def test_layers_of_other_sizes_and_without_rows_are_hatched() -> None:
    empty = Layer(torch.full((2,), math.nan), (), (), {})
    figure, ax = plot_load_by_layer({"a": Layer.of_head(head_of([1, 1, 1])), "b": empty})
    draw(figure)
    assert ax.images[0].get_array().mask.tolist() == [[False] * 3, [True] * 3]
    assert ax.get_title() == "2 layers, no dead expert"


def test_dead_experts_by_layer_and_epoch() -> None:
    figure, ax = plot_dead_by_epoch({"layers.0": {2: 0, 3: 1, 5: 7}, "layers.1": {5: 2}})
    draw(figure)
    (image,) = ax.images
    assert image.get_array().filled(-1).tolist() == [[0, 1, -1, 7], [-1, -1, -1, 2]]
    assert image.get_extent() == [1.5, 5.5, 1.5, -0.5]
    assert [(text.get_position(), text.get_text()) for text in ax.texts] == [
        ((3, 0), "1"),
        ((5, 0), "7"),
        ((5, 1), "2"),
    ]
    figure, ax = plot_dead_by_epoch({f"layers.{layer}": dict.fromkeys(range(100), 3) for layer in range(100)})
    draw(figure)
    assert not ax.texts
    assert len(ax.get_yticks()) <= 50
