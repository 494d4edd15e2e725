"""Tables of many layers, and of numbers that are unknown."""

import math

from moe_heads.analysis.expert_utilization.tables import heads_table, layers_table
from tests.support.utilizations import head_of, heads_of


def test_the_table_of_the_layers_names_the_worst_and_has_a_bounded_size() -> None:
    heads = heads_of(48, 128)
    heads["model.layers.7.mlp.gate"] = head_of([1.0] * 64 + [0.0] * 64)
    heads["model.layers.9.mlp.gate"] = head_of([40.0] + [1.0] * 127, dropped=0.25)
    text = layers_table(heads)
    assert text.startswith("48 layers with 128 experts each. Dead: 72 experts in 9 layers. Starved: ")
    row = next(line for line in text.splitlines() if line.startswith("| max violation |"))
    assert "| model.layers.9.mlp.gate |" in row
    dropped = next(line for line in text.splitlines() if line.startswith("| dropped |"))
    assert dropped.startswith("| dropped | 0.25 | model.layers.9.mlp.gate | 0 | 0 | ")
    worst = text.split("effective experts:\n\n")[1].splitlines()[2]
    assert worst.startswith("| model.layers.7.mlp.gate | 64 | 0 | 1 | 1 | 0.5 |")
    assert "Dead in model.layers.7.mlp.gate: 64 of 128 experts, number 64, 65," in text
    assert " 79 and 48 more." in text
    assert len(text) < 4000
    assert len(layers_table(heads_of(96, 256))) < 4000


def test_unknown_numbers_are_called_unknown() -> None:
    unknown = {"entropy": math.nan, "entropy_of_mean": math.nan, "margin": math.nan}
    one = heads_table({"gate": head_of([1, 1], **unknown), "other": head_of([1, 1], margin=math.inf)})
    assert "| entropy | unknown | 0.5 |" in one
    assert "| margin | unknown | – |" in one
    many = layers_table(heads_of(6, 8, **unknown))
    assert "| relative entropy (lowest, median, highest) | unknown | – | unknown | unknown | – |" in many
    assert "nan" not in one + many


def test_layers_of_several_sizes() -> None:
    assert layers_table(heads_of(3, 8) | {"last": head_of([1] * 4)}).startswith("4 layers with 4 to 8 experts each.")
