"""Streams that an analysis in the middle of an epoch would read away from the training."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from tests.support.analyses import Weight
from tests.support.lightning_models import PlainModule, loader, trainer


class OwnIterator(IterableDataset[Any]):
    """Has one position, as a reader of a file has."""

    def __iter__(self) -> Iterator[Any]:
        self.position = 0
        return self

    def __next__(self) -> Any:
        if self.position == 40:
            raise StopIteration
        self.position += 1
        return torch.full((5,), float(self.position)), 0


class NewIterators(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for number in range(40):
            yield torch.full((5,), float(number)), 0


def fit(dataset: Any, analysis: Weight) -> None:
    trainer(analysis).fit(PlainModule(), DataLoader(dataset, 8), loader())


def test_a_stream_that_is_its_own_iterator_raises_an_error_before_training() -> None:
    analysis = Weight(splits=["train"], every_n_train_steps=2)
    with pytest.raises(
        MisconfigurationException,
        match=r"Weight\(every_n_train_steps=...\): expected training data whose __iter__ returns a new iterator, got"
        " OwnIterator",
    ):
        fit(OwnIterator(), analysis)
    assert analysis.tracked_steps == {}


def test_other_splits_other_points_and_other_streams_are_fine() -> None:
    fit(OwnIterator(), Weight(splits=["val"], every_n_train_steps=2))
    fit(OwnIterator(), Weight(splits=["train"], every_n_epochs=1))
    stream = Weight(splits=["train"], every_n_train_steps=2)
    fit(NewIterators(), stream)
    assert list(stream.tracked_steps["train"]) == [2, 4]
