"""The samplers of a loader are respected."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from moe_heads.callbacks._shared.sample import Sample, draw_sample

X = torch.arange(60.0).unsqueeze(1)
DATA = TensorDataset(X, torch.arange(60) % 3)


def draw(loaders: Any, num_samples: int = 1000, size: int = 10, seed: int = 0, **options: Any) -> Sample:
    return draw_sample("train", loaders, num_samples, size, seed, **options)


def numbers(sample: Sample) -> list[int]:
    return [int(number) for batch in sample.batches for number in batch[0].flatten()]


class Buckets(Sampler[list[int]]):
    """Batches of one remainder each, in an order from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        buckets = [[i for i in range(60) if i % 3 == k][j : j + 10] for k in range(3) for j in (0, 10)]
        for place in torch.randperm(6, generator=self.generator).tolist():
            yield buckets[place]


def test_a_batch_sampler_keeps_its_batches_and_its_state() -> None:
    buckets = Buckets()
    state = buckets.generator.get_state()
    sample = draw(DataLoader(DATA, batch_sampler=buckets), 25, 50)
    assert sample.batches.sizes == (10, 10, 10)
    assert all(len({int(number) % 3 for number in batch[0]}) == 1 for batch in sample.batches)
    assert (buckets.epoch, sample.num_available, sample.are_exchangeable) == (0, 60, False)
    assert torch.equal(buckets.generator.get_state(), state)
    assert "30 of 60, in 3 of the 6 batches that the loader's Buckets forms, drawn with seed 0" in sample.description
    again, other = (
        draw(DataLoader(DATA, batch_sampler=buckets), 25),
        draw(DataLoader(DATA, batch_sampler=buckets), 25, seed=1),
    )
    assert numbers(again) == numbers(sample) != numbers(other)


def test_a_list_of_batches_and_one_in_place_of_a_sampler() -> None:
    batches = [[0, 1], [2, 3, 4], [5]]
    for loader in (DataLoader(DATA, batch_sampler=batches), DataLoader(Whole(), sampler=batches, batch_size=None)):
        sample = draw(loader)
        assert sorted(sample.batches.sizes) == [1, 2, 3] and sorted(numbers(sample)) == list(range(6))


class Whole(Dataset[Any]):
    """Takes the indices of a whole batch."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, indices: list[int]) -> Any:
        return X[indices], torch.tensor(indices) % 3


def test_torchs_way_to_read_whole_batches() -> None:
    sampler = BatchSampler(RandomSampler(range(60)), batch_size=10, drop_last=False)
    sample = draw(DataLoader(Whole(), sampler=sampler, batch_size=None), 20, 5)
    assert sample.num_samples == 20 and len(set(numbers(sample))) == 20


class Keyed(Dataset[Any]):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, key: str) -> Any:
        return X[int(key[2:])], int(key[2:]) % 3


def test_string_keys_are_those_that_the_sampler_gives() -> None:
    keys = [f"id{number}" for number in range(0, 60, 2)]
    sample = draw(DataLoader(Keyed(), batch_size=10, sampler=keys), 20)
    assert set(numbers(sample)) < set(range(0, 60, 2)) and len(set(numbers(sample))) == 20
    assert "20 of 30 of those that the loader's list returns" in sample.description


def test_an_endless_sampler_ends() -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            while True:
                yield int(torch.randint(60, ()))

    state = torch.get_rng_state()
    assert draw(DataLoader(DATA, batch_size=5, sampler=Endless()), 20).num_samples == 20
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_respected_and_described() -> None:
    weights = torch.where(torch.arange(60) < 3, 19.0, 1.0)
    sampler = WeightedRandomSampler(weights, 5000)
    sample = draw(DataLoader(DATA, batch_size=10, sampler=sampler), 2000, 100)
    share = sum(number < 3 for number in numbers(sample)) / 2000
    assert share == pytest.approx(0.5, abs=0.05)
    assert (
        "2,000 drawn from 60 with the weights of the loader's WeightedRandomSampler, with replac" in sample.description
    )
    assert sample.are_exchangeable
    once = draw(DataLoader(DATA, batch_size=10, sampler=WeightedRandomSampler(weights, 20, replacement=False)))
    assert len(set(numbers(once))) == 20


def test_a_sampler_over_another_data_set_is_reported_as_unused() -> None:
    loader = DataLoader(DATA, batch_sampler=Buckets())
    offered = TensorDataset(X[:30], torch.zeros(30))
    assert "without the loader's Buckets" in draw(loader, dataset=offered).description
    assert "that the loader's Buckets forms" in draw(loader, dataset=TensorDataset(X, torch.zeros(60))).description


def test_every_batch_is_a_random_sample_of_the_draw() -> None:
    sample = draw(DataLoader(DATA, batch_size=10), 60, 20)
    assert sample.are_exchangeable
    means = [float(batch[0].mean()) for batch in sample.batches]
    assert max(means) - min(means) < 15  # in order they would be 9.5, 29.5 and 49.5


def test_the_default_batch_is_no_larger_than_the_loaders() -> None:
    loader = DataLoader(DATA, batch_size=2)
    assert set(draw(loader, size=50, is_size_default=True).batches.sizes) == {2}
    assert draw(loader, size=50).batches.sizes == (50, 10)
    assert set(draw(DataLoader(DATA, batch_size=55), size=50, is_size_default=True).batches.sizes) == {50, 10}


def test_the_number_of_samples_is_the_number_of_indices_for_any_batch() -> None:
    def packed(items: list[Any]) -> Any:
        return torch.cat([x for x, _ in items for _ in range(9)]), torch.tensor([len(items)])

    assert draw(DataLoader(DATA, batch_size=10, collate_fn=packed), 30).batches.sizes == (10, 10, 10)
    given = draw(DataLoader(DATA, batch_size=10, collate_fn=packed), 30, batch_size_fn=lambda batch: len(batch[0]))
    assert given.batches.sizes == (90,)


def test_samples_that_could_not_be_read_do_not_count() -> None:
    class Holes(Dataset[Any]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            return None if index % 5 == 0 else X[index]

    loader = DataLoader(
        Holes(), batch_size=20, collate_fn=lambda items: [torch.stack([x for x in items if x is not None])]
    )
    assert draw(loader, size=20).batches.sizes == (16,)
