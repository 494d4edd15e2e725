"""Classes from the labels: which labels stand for none, and which are not classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.classes import (
    Classes,
    check_class_names,
    checked_ignore_index,
    decide_classes,
    listed,
)
from moe_heads.analysis.expert_utilization.function import expert_utilization
from moe_heads.analysis.expert_utilization.label_counts import LabelCounts
from moe_heads.analysis.expert_utilization.labels import IGNORED, BatchLabels, read_labels
from tests.support.hand_routers import HandModel
from tests.support.processes import run_on_ranks


def classes_of(
    labels: torch.Tensor | list[int],
    num_classes: int | None = None,
    names: list[str] | None = None,
    ignore: Any = None,
    **options: Any,
) -> Classes:
    tensor = torch.as_tensor(labels)
    counts = LabelCounts.of([(read_labels(lambda batch: tensor, None), len(tensor))])
    return decide_classes(counts, num_classes, names, checked_ignore_index(ignore), **options)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-3, 6), min_size=1, max_size=20), st.sets(st.integers(0, 6), max_size=2))
def test_negative_and_given_labels_stand_for_no_class(labels: list[int], ignore: set[int]) -> None:
    kept = [label for label in labels if label >= 0 and label not in ignore]
    assume(kept and set(labels) != {-1, 1})
    found = classes_of(labels, ignore=ignore)
    assert found.num_classes == max(kept) + 1
    assert found.names == tuple(str(c) for c in range(max(kept) + 1))
    assert sum(found.ignored.values()) == len(labels) - len(kept)
    tensor = torch.tensor(labels)
    expected = [label if label in kept else IGNORED for label in labels]
    assert found.read(lambda batch: tensor, None).values.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("num_classes", [2, 21, 150, 254])
def test_255_behind_a_gap_is_ignored_in_every_type(dtype: torch.dtype, num_classes: int) -> None:
    labels = torch.tensor([*range(num_classes), 255, 255], dtype=dtype)
    found = classes_of(labels)
    assert (found.num_classes, found.ignored) == (num_classes, {255: 2})
    assert classes_of(labels, num_classes=num_classes).ignored == {255: 2}
    assert classes_of(labels, num_classes=256).ignored == {}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_the_largest_value_of_a_type_is_ignored(dtype: torch.dtype) -> None:
    largest = torch.iinfo(dtype).max
    found = classes_of(torch.tensor([0, 1, 2, largest], dtype=dtype))
    assert (found.num_classes, found.ignored) == (3, {largest: 1})


def test_255_among_other_labels_is_a_class() -> None:
    assert classes_of(torch.arange(256, dtype=torch.uint8)).num_classes == 256
    assert classes_of(torch.arange(300)).num_classes == 300
    some = torch.arange(256, dtype=torch.uint8)[torch.tensor([c % 3 != 2 for c in range(256)])]
    assert classes_of(some).num_classes == 256  # gaps everywhere
    assert classes_of([True, False]).num_classes == 2


@pytest.mark.parametrize("labels", [[-1, 1, 1], torch.tensor([0, 255, 255], dtype=torch.uint8)])
def test_two_values_that_may_be_two_classes_are_asked_for(labels: Any) -> None:
    found = classes_of(labels)
    assert found.num_classes is None
    assert "which are two classes, or one class and a mark" in found.reason.text
    mark = 255 if isinstance(labels, torch.Tensor) else -1
    assert f"pass ignore_index={mark}" in found.reason.text
    assert classes_of(labels, ignore=mark).num_classes == (1 if mark == 255 else 2)
    assert classes_of(labels, is_whole=False).reason is None


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 3, 7], {"num_classes": 3}, "labels: expected classes 0 to 2, got 2 labels up to 7. Pass ignore_index"),
        ([0, 2], {"names": ["a", "b"]}, r"expected classes 0 to 1 (2 class_names), got 1 labels up to 2."),
        ([-100, -100, -1], {}, "expected a class for at least one sample, got ignored labels only: -100 (2), -1 (1)."),
        ([0, 0], {"ignore": 0}, "got ignored labels only: 0 (2)."),
    ],
)
def test_labels_that_are_no_classes(labels: list[int], options: dict[str, Any], message: str) -> None:
    reason = classes_of(labels, **options).reason
    assert message in reason.text
    assert reason.is_odd


def test_token_ids_are_no_classes() -> None:
    ids = torch.randint(50_257, (40, 128))
    found = classes_of(ids)
    assert "as for counts, regression targets and token ids" in found.reason.text
    assert not found.reason.is_odd
    assert found.num_classes is None
    assert classes_of(ids % 1000).num_classes == 1000
    assert not classes_of(ids % 1000).per_sample
    assert classes_of(ids, num_classes=50_257).num_classes == 50_257
    # of samples, unlike of tokens, there may be as many classes as labels
    many = torch.arange(3000)
    assert classes_of(many).num_classes == 3000
    assert classes_of(many[1000:]).reason is not None
    assert classes_of(many[1000:], is_whole=False).reason is None
    assert classes_of(torch.stack([many, many], 1)).reason is not None


def test_batches_without_labels() -> None:
    labeled, unlabeled = (BatchLabels(torch.arange(3)), 3), (BatchLabels(), 3)
    none = decide_classes(LabelCounts.of([unlabeled, unlabeled]), None, None)
    assert not none.reason.is_odd
    some = decide_classes(LabelCounts.of([labeled, unlabeled, unlabeled]), None, None)
    assert "expected labels for all batches or for none, got 2 of 3 batches without" in some.reason.text
    assert some.reason.is_odd


def test_labels_that_change_between_two_calls_are_a_problem() -> None:
    found = classes_of([0, 1, 2])
    other = found.read(lambda batch: torch.tensor([0, 7]), None)
    assert other.values is None
    assert "expected the same labels in every call" in other.problem.text
    assert Classes().read(lambda batch: torch.tensor([0]), None).values is None


@pytest.mark.parametrize("value", [True, 1.0, "255", [0, "a"], [1.5], object()])
def test_bad_ignore_index(value: Any) -> None:
    with pytest.raises(ValueError, match="ignore_index: expected an integer, a list of integers or None, got"):
        checked_ignore_index(value)


def test_class_names_and_their_number() -> None:
    with pytest.raises(ValueError, match="class_names: expected num_classes = 3 names, got 2"):
        check_class_names(3, ["a", "b"])
    assert Classes.of(2, ["a", "b"]).names == ("a", "b")


def test_ignored_labels_as_text() -> None:
    assert listed({-100: 3, 255: 0, -1: 2}) == "-100 (3), -1 (2)"
    assert listed({-value: 1 for value in range(1, 9)}).endswith("-5 (1) and 3 more values")


def decided_on_rank(rank: int) -> list[Any]:
    """Each rank has other labels: only together they show the classes, and one rank alone has a problem."""
    group = torch.distributed.group.WORLD
    found: list[Any] = []
    kinds: list[list[Any]] = [
        [torch.tensor([0, 1, 1, 0]), torch.tensor([5, 255, -1, 0])],
        [torch.tensor([0, 1, 2, 1]), torch.rand(4)],
        [torch.tensor([0, 1, 2, 1]), None],
        [torch.arange(4) % 2, torch.zeros(4, 3).long()],
    ]
    for kind in kinds:
        model = nn.Sequential(HandModel(3, 1))
        batches = [(torch.eye(3)[torch.arange(4) % 3], kind[rank])]
        result = expert_utilization(model, batches, ranks=Ranks(group), num_permutations=10)
        (head,) = result.heads.values()
        counts = None if head.class_counts is None else head.class_counts.tolist()
        found.append((result.no_classes, result.ignored_labels, result.class_names, counts, head.load.tolist()))
    return found


def test_ranks_decide_alike(tmp_path: Path) -> None:
    first, second = run_on_ranks(decided_on_rank, tmp_path)
    assert first == second
    together, floats, missing, shapes = first
    assert together[:3] == ("", {-1: 1, 255: 1}, tuple("012345"))
    assert [sum(row) for row in together[3]] == [3, 2, 0, 0, 0, 1]
    assert "expected integers" in floats[0]
    assert "for all batches or for none, got 1 of 2" in missing[0]
    assert "each of the 4 rows" in shapes[0]
    for found in first:
        assert sum(found[4]) == pytest.approx(1)
    assert [found[3] is None for found in first] == [False, True, True, True]
