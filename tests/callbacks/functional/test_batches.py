"""Batches in any common container."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_heads.callbacks.functional.batches import as_batches, batch_size, call_model, labels_of, to_device


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 2),
        (torch.zeros(3, 2), torch.zeros(3)),
        {"x": torch.zeros(3, 2), "y": [torch.zeros(3)]},
        ["text", torch.tensor(1.0), torch.zeros(3)],
    ],
)
def test_size_is_that_of_the_first_tensor_with_a_dimension(batch: Any) -> None:
    assert batch_size(batch) == 3


def test_batch_without_a_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="batch: expected a tensor with a batch dimension somewhere inside; got list"):
        batch_size(["text"])


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 2)], iter([])])
def test_empty_data_are_refused(batches: Any) -> None:
    with pytest.raises(ValueError, match=r"batches: expected at least one batch .* got an empty loader"):
        as_batches(batches)


def test_a_tensor_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batches: expected a list of batches; got one tensor, \(5, 2\)"):
        as_batches(torch.zeros(5, 2))


def test_generators_are_read_once() -> None:
    assert len(as_batches(torch.zeros(1, 2) for _ in range(3))) == 3


def test_to_device_keeps_what_is_no_tensor() -> None:
    moved = to_device({"x": torch.zeros(2), "name": "a"}, "meta")
    assert moved["x"].device.type == "meta"
    assert moved["name"] == "a"


def test_model_is_called_with_a_batchs_inputs() -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return scale * x

    x = torch.ones(2)
    assert torch.equal(call_model(Named(), x), x)
    assert torch.equal(call_model(Named(), (x, "label")), x)
    assert torch.equal(call_model(Named(), {"x": x, "scale": 2.0, "label": 1}), 2 * x)


def test_labels_are_the_second_entry_if_they_look_like_classes() -> None:
    labels = torch.tensor([0, 1])
    assert labels_of((torch.zeros(2), labels)) is labels
    assert labels_of([torch.zeros(2), torch.zeros(2)]) is None
    assert labels_of((torch.zeros(2), labels.unsqueeze(1))) is None
    assert labels_of(torch.zeros(2)) is None
    assert labels_of((torch.zeros(2),)) is None
