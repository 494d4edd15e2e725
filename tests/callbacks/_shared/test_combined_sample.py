"""Combination of several training loaders."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.callbacks._shared.sample import Sample, draw_sample

LOADERS = {
    "labeled": DataLoader(TensorDataset(torch.arange(30.0)), batch_size=10),
    "unlabeled": DataLoader(TensorDataset(torch.arange(210.0)), batch_size=70),
}
SHORT = {"a": LOADERS["labeled"], "b": DataLoader(TensorDataset(torch.arange(20.0)), batch_size=10)}


def draw(loaders: Any, num_samples: int = 1000, size: int = 50, *, is_size_default: bool = True) -> Sample:
    return draw_sample("train", loaders, num_samples, size, 0, is_size_default=is_size_default)


def shapes(sample: Sample) -> list[tuple[int, ...]]:
    return [tuple(0 if part is None else len(part[0]) for part in batch.values()) for batch in sample.batches]


def test_batches_are_those_of_the_training() -> None:
    sample = draw(LOADERS)
    assert shapes(sample) == [(10, 70)] * 3
    assert (sample.batches.sizes, sample.num_samples, sample.are_exchangeable) == ((80, 80, 80), 240, False)
    assert "2 loaders together (max_size_cycle), 3 steps: ['labeled']: 30 of 30, drawn" in sample.description
    assert "['unlabeled']: 210 of 210, drawn" in sample.description


def test_a_requested_batch_size_keeps_the_proportion() -> None:
    assert shapes(draw(LOADERS, size=7, is_size_default=False)) == [(1, 7)] * 30


def test_num_samples_is_the_most_of_each_loader() -> None:
    assert shapes(draw(LOADERS, num_samples=100)) == [(10, 70)] * 2


@pytest.mark.parametrize(
    ("mode", "found", "warned"),
    [
        ("max_size_cycle", [(10, 10)] * 3, "the 20 samples of ['b'] are repeated, 30 in all"),
        ("max_size", [(10, 10), (10, 10), (10, 0)], ""),
        ("min_size", [(10, 10)] * 2, "10 of the 30 samples of ['a'] are dropped"),
    ],
)
def test_modes(mode: Any, found: Any, warned: str) -> None:
    sample = draw(CombinedLoader(SHORT, mode))
    assert shapes(sample) == found
    assert sample.num_samples == sum(map(sum, found))
    assert warned in sample.description


def test_one_after_the_other() -> None:
    sample = draw(CombinedLoader(SHORT, "sequential"))
    assert [len(batch[0]) for batch in sample.batches] == [10] * 5
    assert sample.num_samples == 50


def test_unused_validation_loaders_are_reported() -> None:
    sample = draw_sample("val", list(LOADERS.values()), 100, 50, 0)
    assert sample.num_samples == 30
    assert sample.description.endswith("; the other 1 of 2 loaders are left out")
