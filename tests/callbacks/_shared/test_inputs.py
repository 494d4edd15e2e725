"""Division of a sample among ranks."""

from typing import Any

import pytest
import torch

from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.callbacks._shared.inputs import _share


def ranks(rank: int, size: int) -> Ranks:
    found = Ranks()
    found.rank, found.size = rank, size
    return found


def shares(batches: list[Any], size: int) -> list[Any]:
    return [_share(batches, ranks(rank, size)) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_sample_goes_to_one_rank_and_all_have_about_the_same(size: int) -> None:
    batches = [torch.arange(9), torch.arange(9, 20), torch.arange(20, 25)]
    found = shares(batches, size)
    assert all(len(share) == len(batches) for share in found)  # a loss that talks to the other ranks finds them
    numbers = torch.cat([batch for share in found for batch in share])
    assert sorted(numbers.tolist()) == list(range(25))
    counts = [sum(map(len, share)) for share in found]
    assert max(counts) - min(counts) <= len(batches)


def test_what_cannot_be_cut_goes_whole_in_turn() -> None:
    batches = [(torch.full((2,), float(number)), ["a", "b"]) for number in range(5)]
    found = shares(batches, 2)
    assert [[int(x[0]) for x, _ in share] for share in found] == [[0, 2, 4], [1, 3]]


def test_no_rank_gets_an_empty_share() -> None:
    assert shares([torch.zeros(1)], 2) == [None, None]
    assert shares([torch.zeros(5)], 1) == [None]
