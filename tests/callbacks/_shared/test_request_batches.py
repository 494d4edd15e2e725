"""Batches of a size from the data of a context, collated from samples of their own."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from moe_heads.callbacks import InferenceTimingCallback
from moe_heads.callbacks._shared import request_batches as room
from moe_heads.callbacks._shared.plain_context import PlainContext
from moe_heads.callbacks._shared.request_batches import request_batches
from tests.support.untouched import untouched

LENGTHS = [3, 9, 4, 7, 5, 8]


class Sequences(Dataset):
    """Sequences whose entries are their index, and a count of the reads."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.read = lengths, list[int]()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return torch.full((self.lengths[index], 2), float(index)), index % 3


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(torch.full((length, 2), float(place)), 0) for place, length in enumerate(LENGTHS)])


def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    padded = pad_sequence([x for x, _ in samples], batch_first=True, padding_value=-1)
    return padded, torch.tensor([y for _, y in samples])


def drawn(loader: Any, *, may_repeat: bool = False) -> Any:
    context = PlainContext({"test": loader}, "cpu")
    return request_batches(context, "test", 0, may_repeat=may_repeat)


def samples_of(batch: tuple[Tensor, Tensor]) -> list[int]:
    return batch[0][:, 0, 0].long().tolist()


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context outside of an analysis has no model."""
    monkeypatch.setattr(PlainContext, "transfer", lambda self, batch: batch)


def test_a_batch_is_padded_to_the_longest_of_its_own_samples() -> None:
    draw, reason = drawn(DataLoader(Sequences(LENGTHS), 2, collate_fn=collate))
    assert reason == ""
    batches = [draw(size) for size in (1, 2, 3)]
    used = [index for batch in batches for index in samples_of(batch)]
    assert sorted(used) == list(range(6))
    for batch in batches:
        assert batch[0].shape[1] == max(LENGTHS[index] for index in samples_of(batch))
    # the first samples follow the last ones
    assert samples_of(draw(2)) == used[:2]
    assert "6 of 6, drawn with seed 0" in draw.origin


def test_a_batch_sampler_keeps_its_order() -> None:
    class Buckets(BatchSampler):
        def __init__(self) -> None: ...

        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0, 2, 4], [1, 3, 5]])

        def __len__(self) -> int:
            return 2

    draw, _ = drawn(DataLoader(Sequences(LENGTHS), batch_sampler=Buckets(), collate_fn=collate))
    assert {tuple(samples_of(draw(3))) for _ in range(2)} == {(0, 2, 4), (1, 3, 5)}
    assert "the loader's Buckets forms" in draw.origin


def test_an_iterable_data_set_gives_its_first_samples() -> None:
    draw, _ = drawn(DataLoader(Stream(), 2, collate_fn=collate))
    assert samples_of(draw(4)) == [0, 1, 2, 3]
    assert samples_of(draw(4)) == [4, 5, 0, 1]
    assert "the first ones of an iterable data set" in draw.origin


def test_samples_are_read_as_they_are_needed_and_those_of_one_shape_are_repeated_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "_MOST_ALIKE", 4)
    monkeypatch.setattr(room, "_MOST_SAMPLES", 8)
    for lengths, may_repeat, most in ((20 * [3], True, 4), (20 * [3], False, 8), (4 * LENGTHS, True, 8)):
        dataset = Sequences(lengths)
        draw, _ = drawn(DataLoader(dataset, 2, collate_fn=collate), may_repeat=may_repeat)
        draw(2)
        assert len(dataset.read) <= 3
        assert len(draw(30)[0]) == 30
        assert len(dataset.read) == most


def test_a_collate_function_that_changes_its_samples_gets_copies() -> None:
    def changing(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        batch = collate(samples)
        for x, _ in samples:
            x.fill_(99)
        return batch

    draw, _ = drawn(DataLoader(Sequences([3, 4]), 2, collate_fn=changing))
    assert [samples_of(draw(2)) for _ in range(2)] == [samples_of(draw(2))] * 2


def test_unreadable_samples_are_left_out() -> None:
    class Holes(Sequences):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index) if index % 2 else None

    draw, _ = drawn(DataLoader(Holes(LENGTHS), 2, collate_fn=collate))
    assert sorted(samples_of(draw(3))) == [1, 3, 5]


def test_data_that_are_batches_have_a_reason() -> None:
    class Whole(Sequences):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(4, 3, 2)

    class Once(Stream):
        def __next__(self) -> None:
            raise StopIteration

    assert drawn([torch.zeros(4, 2)]) == (None, "the data are batches and no DataLoader")
    assert drawn(DataLoader(Whole([1, 2]), batch_size=None)) == (None, "the data set returns whole batches")
    assert drawn(DataLoader(Once(), 2)) == (None, "the data set can be read once only")


class Watched(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mean(1)


OPTIONS: dict[str, Any] = {"batch_sizes": (1, 4), "num_runs": 6, "warmup_runs": 0}


def test_the_callback_times_requests_and_names_where_the_batches_are_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, callback = Watched(), InferenceTimingCallback(**OPTIONS)
    with untouched(model):
        timing = callback.analyze(model, test=DataLoader(Sequences(4 * LENGTHS), 6, collate_fn=collate))["test"]
    shapes = timing.requests.shapes
    assert {len(draws) for draws in shapes.values()} == {5}
    assert len(set(shapes[1])) > 1
    assert "each collated from samples of its own, of 24 of 24, drawn with seed 0" in timing.summary()
    assert "model/batch1/between_draws_ms" in callback.report(timing).metrics


def test_the_callback_cuts_a_batch_where_the_data_are_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    timing = InferenceTimingCallback(**OPTIONS).analyze(Watched(), test=[(torch.randn(6, 5, 2), torch.zeros(6))])[
        "test"
    ]
    assert timing.requests.shapes == {1: ("1×5×2",), 4: ("4×5×2",)}
    assert timing.requests.origin.endswith("because the data are batches and no DataLoader")


def test_a_collate_function_that_fails_is_named_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def whole_batches_only(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        if len(samples) < 2:
            raise RuntimeError("needs two samples")
        return collate(samples)

    loader = DataLoader(Sequences(LENGTHS), 6, collate_fn=whole_batches_only)
    with pytest.raises(
        ValueError, match=r"example_batch\(1\): .* got RuntimeError: needs two samples\. Pass a function"
    ):
        InferenceTimingCallback(**OPTIONS).analyze(Watched(), test=loader)
