"""Batches in any common container."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import (
    call_model,
    cut,
    is_divisible,
    leaves_of,
    map_leaves,
    to_device,
)


@dataclass(frozen=True)
class Images:
    pixels: torch.Tensor
    labels: torch.Tensor


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 2)], iter([])])
def test_empty_data_raise_an_error(batches: Any) -> None:
    with pytest.raises(ValueError, match=r"batches: expected at least one batch .* got an empty loader"):
        Batches.of(batches)


def test_a_tensor_in_place_of_a_list_raises_an_error() -> None:
    with pytest.raises(ValueError, match=r"batches: expected a list of batches, got one tensor of shape \(5, 2\)"):
        Batches.of(torch.zeros(5, 2))


def test_a_loader_leaves_the_global_generators_where_they_were() -> None:
    states = torch.get_rng_state()
    Batches.of(DataLoader(TensorDataset(torch.arange(8)), batch_size=2, shuffle=True))
    assert torch.equal(torch.get_rng_state(), states)


def test_generators_are_read_once() -> None:
    assert len(Batches.of(torch.zeros(1, 2) for _ in range(3))) == 3


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
    with pytest.raises(
        ValueError, match=r"parameter of Named\.forward, got \['image', 'scale'\] without \['x'\]\. Pass forward_fn"
    ):
        call_model(Named(), {"image": x, "scale": 2.0})


@pytest.mark.parametrize(
    "batch",
    [
        Images(torch.arange(6.0), torch.arange(6)),
        UserDict(x=torch.arange(6.0), nothing=None),
        Pair(torch.arange(6.0), torch.arange(6)),
        {"x": [torch.arange(6.0), (torch.arange(6),)]},
        torch.arange(6.0),
    ],
)
def test_containers_are_rebuilt_and_cut(batch: Any) -> None:
    assert is_divisible(batch)
    part = cut(batch, 2, 4)
    assert type(part) is type(batch)
    assert all(leaf.tolist() == [2, 3] for leaf in leaves_of(part) if leaf is not None)
    assert all(len(leaf) == 6 for leaf in leaves_of(batch) if leaf is not None)  # not changed
    doubled = map_leaves(batch, lambda leaf: leaf if leaf is None else 2 * leaf)
    assert float(leaves_of(doubled)[0][1]) == 2


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(4, 2), ["a", "b", "c", "d"]),
        (torch.zeros(4, 2), torch.zeros(2, 9)),  # a graph, say: nodes and edges
        (torch.zeros(4, 2), torch.tensor(3.0)),
        [torch.zeros(3, 8, 8), torch.zeros(3, 9, 7), torch.zeros(2, 4)],
        (torch.nn.utils.rnn.pack_sequence([torch.zeros(4), torch.zeros(2)]), torch.zeros(2)),
        [],
    ],
)
def test_what_may_not_be_samples_is_not_cut(batch: Any) -> None:
    assert not is_divisible(batch)


def test_packed_sequences_move_as_a_whole() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(4), torch.zeros(2)])
    moved = to_device((packed, torch.zeros(2)), "cpu")[0]
    assert torch.equal(moved.data, packed.data)
    assert torch.equal(moved.batch_sizes, packed.batch_sizes)


def test_a_dataclass_is_passed_by_name() -> None:
    class Named(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return 3 * pixels

    batch = Images(torch.ones(2), torch.tensor([0, 1]))
    assert torch.equal(call_model(Named(), batch), 3 * torch.ones(2))
