"""Quantities of classes: of samples and of tokens, with samples and rows without a class."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_heads.analysis.expert_utilization import class_sums
from moe_heads.analysis.expert_utilization.function import expert_utilization
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization
from moe_heads.analysis.expert_utilization.mutual_information import mutual_information
from moe_heads.analysis.expert_utilization.result import ExpertUtilizationResult
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


def assert_same_without_classes(found: HeadUtilization, expected: HeadUtilization) -> None:
    for name, value in vars(expected).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert getattr(found, name) == value, name
    assert found.class_map is found.class_counts is found.mutual_information is None
    assert found.metrics() == expected.metrics()


X, Y = torch.randn(40, 4), torch.arange(40) % 3


def raising(batch: Any) -> Tensor:
    raise RuntimeError("no labels here")


UNUSABLE: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    "missing in some batches": (None, lambda b: Y if b.shape[0] == 40 else None, "for all batches or for none"),
    "wrong length": (None, lambda b: torch.zeros(len(b) + 1).long(), "each of the 40 rows that head 'head' routed"),
    "floats": (None, lambda b: torch.rand(len(b)), "expected integers, got (40,), torch.float32"),
    "one-hot": (None, lambda b: torch.eye(3)[torch.zeros(len(b)).long()], "For one-hot rows return labels.argmax(-1)"),
    "one-hot integers": (None, lambda b: torch.eye(3)[torch.zeros(len(b)).long()].long(), "For one-hot rows"),
    "multi-label": (None, lambda b: torch.ones(len(b), 3).long(), "For multi-label data there is no single class"),
    "strings": (None, lambda b: ["cat"] * len(b), "expected a tensor of integers, got list"),
    "out of range": (["a", "b"], lambda b: torch.full((len(b),), 7), "expected classes 0 to 1 (2 class_names)"),
    "all ignored": (None, lambda b: torch.full((len(b),), -1), "got ignored labels only: -1 (43)"),
    "an error": (None, raising, "label_fn: failed with RuntimeError: no labels here"),
    "token ids": (None, lambda b: torch.arange(len(b)) + 50_000, "as for counts, regression targets and token ids"),
}


@pytest.mark.parametrize("kind", list(UNUSABLE))
def test_unusable_labels_cost_only_the_classes(kind: str) -> None:
    names, label_fn, message = UNUSABLE[kind]
    data = [X, X[:3]]
    expected = expert_utilization(HandModel(4, 2), data).heads["head"]
    result = expert_utilization(HandModel(4, 2), data, class_names=names, label_fn=label_fn)
    assert_same_without_classes(result.heads["head"], expected)
    assert message in result.no_classes
    assert f"No classes: {result.no_classes}" in result.summary()
    assert result.has_odd_labels is (kind != "token ids")


def test_labels_that_change_between_the_calls() -> None:
    calls: list[int] = []

    def label_fn(batch: Tensor) -> Tensor | None:
        calls.append(1)
        return torch.arange(len(batch)) % 3 if len(calls) < 4 else None

    data = [X, X[:6], X[:3]]
    result = expert_utilization(HandModel(4, 2), data, label_fn=label_fn)
    assert_same_without_classes(result.heads["head"], expert_utilization(HandModel(4, 2), data).heads["head"])
    assert "expected labels for all batches, got None" in result.no_classes


def of_tokens(x: Tensor, labels: Tensor, **options: Any) -> ExpertUtilizationResult:
    """Utilization of three experts that each take tokens with their largest input."""
    batches = list(zip(x.split(7), labels.split(7), strict=True))
    return expert_utilization(HandModel(3, 2), batches, **options)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 4))
def test_labels_of_tokens_are_counted_as_by_a_loop(seed: int, num_samples: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, num_tokens, 3, generator=generator)
    labels = torch.randint(-2, 4, (num_samples, num_tokens), generator=generator)
    labels[0, 0] = 3
    result = of_tokens(x, labels, ignore_index=2)
    head, counts, gates = result.heads["head"], torch.zeros(4, 3).long(), torch.zeros(4, 3).double()
    for sample in range(num_samples):
        for token in range(num_tokens):
            label = int(labels[sample, token])
            if label in (0, 1, 3):
                top = x[sample, token].topk(2)
                counts[label, top.indices] += 1
                gates[label, top.indices] += top.values.softmax(-1).double()
    assert torch.equal(head.class_counts, counts)
    torch.testing.assert_close(head.class_map, gates / gates.sum(1, keepdim=True), equal_nan=True, rtol=1e-6, atol=1e-6)
    assert head.mutual_information == pytest.approx(mutual_information(counts).plugin)
    assert result.no_classes == ""
    occurring = {value: int((labels == value).sum()) for value in (-2, -1, 2)}
    assert {value: count for value, count in result.ignored_labels.items() if count} == {
        value: count for value, count in occurring.items() if count
    }


def test_errors_of_tokens_are_those_of_their_samples() -> None:
    """Equal tokens know no more than one, and labels of tokens have no permutation test."""
    x, labels = torch.randn(400, 1, 3), torch.randint(3, (400, 1))
    x[:, 0, 0] += labels[:, 0]
    one, five = (
        of_tokens(x.expand(-1, n, -1), labels.expand(-1, n), label_fn=lambda b: b[1].contiguous()).heads["head"]
        for n in (2, 6)
    )
    sample = of_tokens(x[:, 0], labels[:, 0]).heads["head"]
    for head in (one, five):
        assert head.mutual_information == pytest.approx(sample.mutual_information)
        assert head.mutual_information_stderr == pytest.approx(sample.mutual_information_stderr, rel=0.3)
        assert head.mutual_information_by_chance is head.mutual_information_p_value is None
        shift = head.mutual_information - head.mutual_information_corrected
        assert shift == pytest.approx(sample.mutual_information - sample.mutual_information_corrected, rel=0.5)
    assert one.mutual_information_stderr == pytest.approx(five.mutual_information_stderr)
    few = of_tokens(x[:7].expand(-1, 2, -1), labels[:7].expand(-1, 2)).heads["head"]
    assert few.mutual_information is not None
    assert few.mutual_information_stderr is few.mutual_information_corrected is None


def test_labels_of_routed_rows() -> None:
    """As for a model that routes x[mask]."""
    x, mask = torch.randn(60, 5, 3), torch.rand(60, 5) < 0.6
    labels = torch.arange(60) % 3
    batches = list(zip(x.split(6), mask.split(6), labels.split(6), strict=True))
    options: dict[str, Any] = {"forward_fn": lambda model, b: model(b[0][b[1]])}
    none = expert_utilization(HandModel(3, 1), batches, label_fn=lambda b: b[2], **options)
    assert none.heads["head"].class_map is None
    assert "If the routed rows are some of the tokens, return one label for each of these rows" in none.no_classes
    found = expert_utilization(
        HandModel(3, 1), batches, label_fn=lambda b: b[2].unsqueeze(1).expand_as(b[1])[b[1]], **options
    )
    counts = torch.zeros(3, 3).long()
    for sample, token in mask.nonzero().tolist():
        counts[labels[sample], x[sample, token].argmax()] += 1
    head = found.heads["head"]
    assert torch.equal(head.class_counts, counts)
    assert head.mutual_information == pytest.approx(mutual_information(counts).plugin)
    assert head.mutual_information_stderr is None or head.mutual_information_stderr > 0


def test_heads_on_samples_and_on_tokens_of_one_model() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.pooled = HandModel(3, 1).head, HandModel(3, 1).head

        def forward(self, x: Tensor) -> None:
            self.tokens(x)
            self.pooled(x.mean(1))

    x, labels = torch.randn(12, 4, 3), torch.randint(3, (12, 4))
    result = expert_utilization(Both(), [(x, labels)])
    assert result.heads["tokens"].class_counts.sum() == 48
    assert result.heads["pooled"].class_map is None
    assert result.heads["pooled"].num_rows == 12
    assert "each of the 12 rows that head 'pooled' routed" in result.no_classes
    of_samples = expert_utilization(Both(), [(x, labels[:, 0])])
    assert all(head.class_map is not None for head in of_samples.heads.values())
    assert of_samples.no_classes == ""


def test_one_batch_that_does_not_match_ends_the_classes_of_the_head() -> None:
    """The number of rows of a batch may match by chance."""
    options: dict[str, Any] = {"label_fn": lambda b: torch.zeros(3).long()}
    found = expert_utilization(HandModel(4, 1), [X[:3], X[:5], X[:3]], **options)
    assert found.heads["head"].class_map is None
    assert found.heads["head"].num_rows == 11


def test_memory_of_many_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    add = class_sums.ClassSums.add

    def measured(self: class_sums.ClassSums, *args: Any) -> None:
        add(self, *args)
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        lists = [each for value in vars(self).values() if isinstance(value, list) for each in value]
        kept.append(sum(tensor.nbytes for tensor in [*tensors, *lists]))

    monkeypatch.setattr(class_sums.ClassSums, "add", measured)
    batches = [(torch.randn(50, 40, 16), torch.randint(100, (50, 40))) for _ in range(4)]
    result = expert_utilization(HandModel(16, 2), batches)
    assert result.heads["head"].class_counts.sum() == 4 * 50 * 40 * 2
    assert kept[-1] == kept[0] <= 4 * class_sums._MAX_COUNTS + 8 * 100 * 16
