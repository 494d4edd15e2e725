"""Labels that are not classes, and samples without a class."""

import pytest
import torch
from torch import nn

from moe_heads.analysis.expert_utilization.function import expert_utilization
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization
from tests.support.hand_routers import HandModel


def utilization(batches: list, **options: object) -> HeadUtilization:
    return expert_utilization(HandModel(3, 1), batches, **options).heads["head"]


def test_samples_without_a_class_count_in_all_but_the_classes() -> None:
    """Label -100, which the cross-entropy ignores: the classes are those of the data without these samples."""
    labels, experts = torch.arange(3).repeat(8), torch.randint(3, (24,))
    x, ignored = 50.0 * nn.functional.one_hot(experts, 3).float(), torch.arange(24) % 5 == 0
    marked = torch.where(ignored, -100, labels)
    batches = [(x[:10], marked[:10]), (x[ignored], marked[ignored]), (x[10:], marked[10:])]
    head = utilization(batches)
    without = utilization([(x[~ignored], labels[~ignored])])
    assert torch.equal(head.class_map, without.class_map)
    assert torch.equal(head.class_counts, without.class_counts)
    assert head.mutual_information == without.mutual_information
    assert head.mutual_information_by_chance == without.mutual_information_by_chance
    assert head.num_rows == 24 + int(ignored.sum())
    none = utilization([(x, torch.full((24,), -100))])
    assert none.class_map is None
    assert torch.equal(none.load, utilization([x]).load)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16])
def test_labels_of_any_whole_type(dtype: torch.dtype) -> None:
    """In uint8 the label -100 would be 156."""
    x, labels = torch.randn(600, 3), torch.arange(200).repeat(3)
    expected, head = utilization([(x, labels)]), utilization([(x, labels.to(dtype))])
    assert torch.equal(head.class_counts, expected.class_counts)
    assert head.mutual_information == expected.mutual_information
    assert int(head.class_counts[156].sum()) == 3


def test_samples_without_finite_logits_count_in_nothing_of_the_classes() -> None:
    x, labels = torch.randn(120, 3), torch.arange(3).repeat(40)
    expected = utilization([(x, labels)])
    head = utilization([(torch.cat([x, torch.full((120, 3), torch.nan)]), torch.cat([labels, labels]))])
    for name in ("", "_corrected", "_stderr", "_by_chance", "_p_value"):
        assert getattr(head, f"mutual_information{name}") == getattr(expected, f"mutual_information{name}"), name


def test_whole_numbers_that_are_no_classes() -> None:
    """As the targets of a regression: a class map of a million rows would tell nothing."""
    x, targets = torch.randn(20, 3), torch.randint(1_000_000, (20,)) + 1000
    assert utilization([(x, targets)]).class_map is None
    assert utilization([(x, targets % 1000)]).class_map is not None
    column = utilization([x], label_fn=lambda b: targets[:, None] % 3)
    assert column.class_map is not None
