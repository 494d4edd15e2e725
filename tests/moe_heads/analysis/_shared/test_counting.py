"""Numbers of samples are inferred from tensors, or an error asks for batch_size_fn."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from moe_heads.analysis._shared.counting import batch_size


@dataclass(frozen=True)
class Images:
    pixels: torch.Tensor
    labels: torch.Tensor


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Graphs:
    """A batch object as of a graph library."""

    def __init__(self, num_graphs: Any = None) -> None:
        self.x = torch.zeros(9, 4)
        if num_graphs is not None:
            self.num_graphs = num_graphs

    def to(self, device: Any) -> "Graphs":
        return self


def image(*sizes: int) -> torch.Tensor:
    return torch.zeros(3, *sizes)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 2),
        (torch.zeros(3, 2), torch.zeros(3)),
        {"x": torch.zeros(3, 2), "y": [torch.zeros(3)]},
        ["text", torch.tensor(1.0), torch.zeros(3)],
        Images(torch.zeros(3, 2), torch.zeros(3)),
        UserDict(x=torch.zeros(3, 2)),
        Pair(torch.zeros(3, 2), torch.zeros(3)),
        (pack_sequence([torch.zeros(4), torch.zeros(2), torch.zeros(1)]), torch.zeros(3)),
        {"ids": torch.zeros(3, 7), "mask": torch.zeros(1, 7), "nothing": None, "names": ["a", "b"]},
        {"x": torch.zeros(3, 5, 4), "mask": torch.zeros(1, 1, 5, 5)},
        {"text": ["a", "b", "c"], "labels": [0, 1, 2]},
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(4), torch.zeros(1)], layout=torch.jagged),
        (torch.eye(3).to_sparse(), torch.zeros(3)),
        ([torch.zeros(3, 8), torch.zeros(3, 8)], torch.zeros(3)),  # two views of each sample
        Graphs(3),
        (Graphs(), torch.zeros(3)),
    ],
)
def test_entries_that_agree(batch: Any) -> None:
    assert batch_size(batch) == 3


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        ((tuple(image(5 + n, 6) for n in range(4)), torch.zeros(4)), 4),
        ((tuple(image(5 + n, 6) for n in range(4)), tuple({"boxes": torch.zeros(n, 4)} for n in range(4))), 4),
        ([{"image": image(5, 5), "boxes": torch.zeros(2, 4)}, {"image": image(6, 6), "boxes": torch.zeros(7, 4)}], 2),
        ({"images": [image(4, 4)] * 4, "labels": torch.zeros(4)}, 4),
    ],
)
def test_lists_of_samples_count_by_their_length(batch: Any, number: int) -> None:
    assert batch_size(batch) == number


@pytest.mark.parametrize(
    ("batch", "warned"),
    [
        ((torch.zeros(30, 100), torch.zeros(100)), r"30 \(\[0\]\), 100 \(\[1\]\)"),  # time first
        ({"tokens": torch.zeros(512), "offsets": torch.zeros(9)}, r"512 \(\['tokens'\]\), 9 \(\['offsets'\]\)"),
        ({"x": torch.zeros(120, 10), "y": torch.zeros(1)}, r"120 \(\['x'\]\), 1 \(\['y'\]\)"),  # a graph and its label
        ({"x": torch.zeros(2, 5, 4), "mask": torch.zeros(5, 5)}, r"2 \(\['x'\]\), 5"),
        ({"images": [image(4, 4)] * 4}, r"3 or 4 \(\['images'\]\)"),  # four images, or four tensors of three samples
        (Images(torch.zeros(3), torch.zeros(2)), r"3 \(\.pixels\), 2 \(\.labels\)"),
    ],
)
def test_entries_that_do_not_agree_are_named_with_the_remedy(batch: Any, warned: str) -> None:
    with pytest.raises(
        ValueError, match=rf"batches\[2\]: expected .* got first dimensions {warned}.* Pass batch_size_fn"
    ):
        batch_size(batch, "batches[2]")


@pytest.mark.parametrize("batch", [["text"], Graphs(), {"step": 3}])
def test_nothing_to_count_by(batch: Any) -> None:
    with pytest.raises(
        ValueError, match=r"batch: expected at least one tensor with a batch dimension, got .* Pass batch_size_fn"
    ):
        batch_size(batch)
