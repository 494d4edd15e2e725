"""Labels of a batch, and the rows of a router to which they belong."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_heads.analysis.expert_utilization.label_entry import labels_of
from moe_heads.analysis.expert_utilization.labels import (
    NO_CLASSES_HINT,
    NoClasses,
    labels_of_rows,
    mismatch,
    read_labels,
    reason_of,
)


def read(labels: Any) -> Any:
    return read_labels(lambda batch: labels, None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_integers_of_any_type(dtype: torch.dtype) -> None:
    found = read(torch.tensor([[3], [0], [1]], dtype=dtype))
    assert found.problem is None
    assert found.values.tolist() == [3, 0, 1]
    assert found.values.dtype == torch.int64
    assert found.largest == torch.iinfo(dtype).max


def test_shapes() -> None:
    assert read(torch.zeros(2, 3, dtype=torch.int64)).values.shape == (2, 3)
    assert read(torch.zeros(2, 3, 4, dtype=torch.int64)).values.shape == (2, 12)  # a map of pixels
    assert read(torch.tensor([True, False])).values.tolist() == [1, 0]
    assert read(None).values is None
    assert read(None).problem is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], "expected a tensor of integers, got list."),
        ([{"boxes": torch.zeros(1, 4)}], "expected a tensor of integers, got list."),
        (torch.tensor([0.5, 1.0]), r"expected integers, got \(2,\), torch.float32. For data"),
        (torch.tensor([0.0, 1.0]), "For classes of a floating-point type return labels.long()"),
        (torch.tensor([0.0, torch.nan]), r"expected integers, got \(2,\), torch.float32. For data"),
        (torch.eye(3), r"got \(3, 3\), torch.float32. For one-hot rows return labels.argmax\(-1\)."),
        (torch.ones(3, 2), "For multi-label data there is no single class of a sample"),
        (torch.tensor([1j]), r"expected integers, got \(1,\), torch.complex64"),
        (torch.tensor(3), r"expected one label for each sample \(B,\) or token \(B, T\), got \(\), torch.int64"),
        (torch.eye(3).to_sparse(), "expected a dense tensor of integers"),
        (
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            "expected a dense tensor of integers",
        ),
    ],
)
def test_other_labels_are_a_problem_and_no_error(labels: Any, message: str) -> None:
    found = read(labels)
    assert found.values is None
    with pytest.raises(ValueError, match=message):
        raise ValueError(found.problem.text)
    assert found.problem.text.endswith(NO_CLASSES_HINT)


def test_an_error_of_the_function_is_a_problem() -> None:
    found = read_labels(lambda batch: batch["y"], {"x": 1})
    assert found.problem == NoClasses("label_fn: failed with KeyError: 'y'")
    unclear = read_labels(labels_of, (torch.zeros(2, 3), torch.tensor([1, 2]), torch.tensor([0, 1])))
    assert unclear.problem.text.startswith("batch: expected only one entry that can be the labels, got batch[1]")


def test_memory_that_runs_out_is_raised() -> None:
    def fail(batch: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        read_labels(fail, None)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 4))
def test_rows_of_samples_and_tokens(num_samples: int, num_tokens: int) -> None:
    """Row n T + t is token t of sample n."""
    num_rows = num_samples * num_tokens
    of_samples, of_tokens = torch.arange(num_samples), torch.arange(num_rows).view(num_samples, num_tokens)
    expected = [n for n in range(num_samples) for _ in range(num_tokens)]
    assert labels_of_rows(of_samples, num_rows, num_tokens).tolist() == expected
    for rows_per_sample in {1, num_tokens}:
        for labels in (of_tokens, of_tokens.flatten()) if num_samples * num_tokens > 1 else ():
            assert labels_of_rows(labels, num_rows, rows_per_sample).tolist() == list(range(num_rows))


@pytest.mark.parametrize(
    ("shape", "num_rows", "rows_per_sample"),
    [((3,), 4, 1), ((40,), 286, 1), ((4, 5), 4, 1), ((6, 2), 12, 3), ((2,), 8, 2)],
)
def test_rows_without_a_label(shape: tuple[int, ...], num_rows: int, rows_per_sample: int) -> None:
    assert labels_of_rows(torch.zeros(shape, dtype=torch.int64), num_rows, rows_per_sample) is None


def test_a_mismatch_names_head_shapes_and_a_remedy() -> None:
    text = mismatch("layers.3", torch.arange(40), 286, 1).text
    assert "for each of the 286 rows that head 'layers.3' routed in a batch, or" in text
    assert "got (40,). If the routed rows are some of the tokens, return one label for each of these rows." in text
    assert "12 rows that head 'a' routed in a batch (4 samples of 3 rows)" in mismatch("a", torch.arange(5), 12, 3).text
    assert "For one-hot rows return labels.argmax(-1)." in mismatch("a", torch.eye(4).long(), 4, 1).text
    assert "For multi-label data" in mismatch("a", torch.ones(4, 3).long(), 4, 1).text


def test_several_heads_give_one_reason() -> None:
    one, other = NoClasses("one."), NoClasses("other.")
    assert reason_of([None, None]) is None
    assert reason_of([None, one]) == one
    assert reason_of([None, one, other]).text == "one. The same holds for 1 more of 3 heads."
