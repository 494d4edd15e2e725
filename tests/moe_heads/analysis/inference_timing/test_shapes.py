import torch
from torch import nn

from moe_heads.analysis.inference_timing.shapes import forms_of, shapes_of


def packed(*lengths: int) -> nn.utils.rnn.PackedSequence:
    return nn.utils.rnn.pack_sequence([torch.zeros(length, 2) for length in lengths])


def nested(*lengths: int) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(length, 2) for length in lengths], layout=torch.jagged)


def test_shapes_have_the_names_of_their_entries() -> None:
    batch = {"ids": torch.zeros(8, 32), "inner": [torch.zeros(8, 3, 4)], "scale": torch.ones(()), "name": "x"}
    assert shapes_of(batch) == "ids 8×32, inner 8×3×4"
    assert shapes_of(packed(4, 2)) == "packed 6×2"
    assert shapes_of(nested(4, 2)) == "nested 2"


def test_forms_differ_in_everything_but_the_number_of_samples() -> None:
    assert forms_of(torch.zeros(8, 32), 8) == forms_of(torch.zeros(2, 32), 2) == forms_of(torch.ones(1, 32), 1)
    assert forms_of(torch.zeros(8, 32), 8) != forms_of(torch.zeros(8, 31), 8)
    # the second dimension may count the samples
    assert forms_of(torch.zeros(5, 8, 3), 8) == forms_of(torch.zeros(5, 2, 3), 2)
    assert forms_of(["ab", "c"], 2) != forms_of(["ab", "cd"], 2)
    for kind in (packed, nested):
        assert forms_of(kind(4, 2), 2) == forms_of(kind(4, 2), 2) != forms_of(kind(3, 3), 2)


def test_an_object_of_unknown_cost_is_like_no_other() -> None:
    class Graph:
        def to(self, device: object) -> "Graph":
            return self

    first, second = Graph(), Graph()
    assert forms_of([first], 1) != forms_of([second], 1)
