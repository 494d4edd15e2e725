import pytest
import torch
from torch import nn

from moe_heads.analysis import inference_timing
from moe_heads.analysis.inference_timing.resizing import check_resizable, num_samples, resized


def test_a_batch_is_repeated_or_cut() -> None:
    batch = (torch.tensor([1, 2, 3]), torch.tensor(7), "name")
    assert resized(batch, 5)[0].tolist() == [1, 2, 3, 1, 2]
    assert resized(batch, 2)[0].tolist() == [1, 2]
    assert resized(batch, 2)[1:] == batch[1:]


PACKED = nn.utils.rnn.pack_padded_sequence(torch.zeros(3, 5, 2), torch.tensor([5, 4, 2]), batch_first=True)


@pytest.mark.parametrize(
    ("stays", "named"),
    [
        (PACKED, "a PackedSequence of 3 sequences"),
        (
            torch.nested.nested_tensor([torch.zeros(n, 2) for n in (5, 4, 2)], layout=torch.jagged),
            "a nested tensor of 3",
        ),
        (torch.zeros(7, 3, dtype=torch.bool), r"a tensor of shape \(7, 3\)"),
        (torch.zeros(6, 7, 7), r"a tensor of shape \(6, 7, 7\)"),
    ],
)
def test_entries_that_count_the_samples_elsewhere_are_named(stays: object, named: str) -> None:
    batch = {"x": torch.zeros(3, 7), "stays": stays}
    with pytest.raises(ValueError, match=f"example_batch: expected tensors whose first .* the 3 samples.* got {named}"):
        check_resizable(batch)


def test_a_model_of_packed_sequences_runs_at_the_size_of_its_example_only() -> None:
    options = {"num_runs": 2, "warmup_runs": 0}
    with pytest.raises(ValueError, match=r"example_batch: .* got a PackedSequence of 3 sequences"):
        inference_timing(nn.LSTM(2, 4), PACKED, batch_sizes=[1, 3], **options)
    timing = inference_timing(nn.LSTM(2, 4), PACKED, batch_sizes=[3], **options)
    # eleven steps in all, four gates
    assert timing.rows[0].flops == 2 * 11 * 4 * 4 * (2 + 4)


def test_what_does_not_count_the_samples_is_no_mistake() -> None:
    check_resizable({"x": torch.zeros(3, 7), "weights": torch.zeros(6), "vocabulary": torch.zeros(8, 4), "name": "x"})
    check_resizable({"x": torch.zeros(1, 7), "table": torch.zeros(9, 1)})
    with pytest.raises(ValueError, match="example_batch: expected a batch that holds a batched tensor, got dict"):
        num_samples({"n": 1})
