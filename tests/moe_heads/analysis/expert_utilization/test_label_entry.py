"""Entry of a batch that holds the labels: found by name or place, and never guessed among several."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.label_entry import UnclearLabelsError, labels_of

X, Y, FLOATS = torch.zeros(4, 3), torch.arange(4), torch.zeros(4)
LENGTHS, TOKENS = torch.tensor([3, 1, 2, 2]), torch.zeros(4, 3, dtype=torch.int64)


@dataclass
class Item:
    x: Tensor
    labels: Tensor
    lengths: Tensor


class Triple(NamedTuple):
    x: Tensor
    lengths: Tensor
    y: Tensor


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, X.bool(), Y),  # a mask of the tokens
        (torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), Y),  # two views of the images
        (X, None, Y),
        (X, 0.5, Y),
        Item(X, Y, LENGTHS),
        Triple(X, LENGTHS, Y),
        *({"x": X, "lengths": LENGTHS, name: Y} for name in ("labels", "label", "y", "target", "targets")),
        UserDict(x=X, y=Y),
        {"x": X, "labels": None, "y": Y},
    ],
)
def test_found(batch: Any) -> None:
    assert labels_of(batch) is Y


def test_every_kind_is_found_and_judged_later() -> None:
    for entry in (FLOATS, X, ["a", "b", "c", "d"]):
        assert labels_of((X, entry)) is entry


@pytest.mark.parametrize(
    "batch", [X, (X,), [], (X, None), {"x": X}, {"input_ids": TOKENS}, 3, "text", [torch.zeros(3, 8, 8)] * 3]
)
def test_none(batch: Any) -> None:
    assert labels_of(batch) is None


@pytest.mark.parametrize(
    ("batch", "candidates"),
    [
        ((X, LENGTHS, Y), "batch[1] ((4,), torch.int64), batch[2] ((4,), torch.int64)"),
        ([X, LENGTHS, Y.unsqueeze(1)], "batch[1] ((4,), torch.int64), batch[2] ((4, 1), torch.int64)"),
        # targets of a regression, weights, one-hot rows, labels of tokens, a mask of tokens and texts
        ((X, LENGTHS, FLOATS), "batch[1] ((4,), torch.int64), batch[2] ((4,), torch.float32)"),
        ((X, LENGTHS, X), "batch[1] ((4,), torch.int64), batch[2] ((4, 3), torch.float32)"),
        ((X, TOKENS, Y), "batch[1] ((4, 3), torch.int64), batch[2] ((4,), torch.int64)"),
        ((X, LENGTHS, list("abcd")), "batch[1] ((4,), torch.int64), batch[2] (list)"),
        (((X, LENGTHS), LENGTHS, Y), "batch[1] ((4,), torch.int64), batch[2] ((4,), torch.int64)"),
        ({"labels": Y, "y": Y}, "batch['labels'] ((4,), torch.int64), batch['y'] ((4,), torch.int64)"),
    ],
)
def test_several_are_asked_for(batch: Any, candidates: str) -> None:
    with pytest.raises(UnclearLabelsError) as raised:
        labels_of(batch)
    assert f"expected only one entry that can be the labels, got {candidates}." in str(raised.value)
    assert raised.value.is_odd


def test_a_last_candidate_is_the_example() -> None:
    with pytest.raises(UnclearLabelsError, match=r"Pass label_fn=lambda batch: batch\[2\], for example"):
        labels_of((X, LENGTHS, Y))


def test_integers_under_another_name_are_suggested() -> None:
    with pytest.raises(UnclearLabelsError, match=r"got batch\['species'\] \(\(4,\), torch.int64\)") as raised:
        labels_of({"x": X, "species": Y})
    assert not raised.value.is_odd
