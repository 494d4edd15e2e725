"""The sample of a split."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

from moe_heads.analysis._shared.progress import Progress
from moe_heads.callbacks._shared.sample import Sample, draw_sample
from tests.support.lightning_models import NUM_FEATURES, loader


def draw(loaders: Any, num_samples: int, size: int, seed: int = 0, **options: Any) -> Sample:
    return draw_sample("train", loaders, num_samples, size, seed, **options)


def first_features(sample: Any) -> torch.Tensor:
    return torch.cat([batch[0] for batch in sample.batches])


def test_is_a_function_of_the_seed_and_not_of_the_loaders_order() -> None:
    plain, shuffled = loader(), loader(shuffle=True, batch_size=3)
    one, two = draw(plain, 10, 4, seed=0), draw(shuffled, 10, 7, seed=0)
    assert torch.equal(first_features(one), first_features(two))
    assert [len(batch[1]) for batch in one.batches] == [4, 4, 2]
    assert not torch.equal(first_features(one), first_features(draw(plain, 10, 4, seed=1)))
    assert (one.num_samples, one.num_available) == (10, 40)
    assert one.description.startswith("10 of 40, drawn with seed 0")


def test_has_no_sample_twice_and_all_when_there_are_few() -> None:
    sample = draw(loader(num_samples=9), 1000, 4, seed=0)
    assert sample.num_samples == 9
    assert len(first_features(sample).unique(dim=0)) == 9


def test_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    draw(loader(shuffle=True), 10, 4, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_collection_of_training_loaders_gives_batches_of_its_structure() -> None:
    sample = draw({"a": loader(), "b": [loader(seed=1)]}, 10, 4, seed=0)
    assert [list(batch) for batch in sample.batches] == [["a", "b"]] * 3
    assert torch.equal(sample.batches[0]["a"][0], draw(loader(), 10, 4, seed=0).batches[0][0])
    assert torch.equal(sample.batches[0]["b"][0][0], draw(loader(seed=1), 10, 4, seed=0).batches[0][0])


def test_the_first_of_several_validation_loaders_is_taken() -> None:
    sample = draw_sample("val", [loader(), loader(seed=1)], 10, 4, seed=0)
    assert torch.equal(sample.batches[0][0], draw(loader(), 10, 4, seed=0).batches[0][0])


@pytest.mark.parametrize("kind", ["loader", "iterable"])
def test_what_gives_whole_batches_is_iterated(kind: str) -> None:
    batches = [(torch.full((3, NUM_FEATURES), float(number)), torch.zeros(3)) for number in range(5)]
    source: Any = DataLoader(batches, batch_size=None) if kind == "loader" else Batches(batches)
    sample = draw(source, 7, 4, seed=0)
    assert [batch[0][0, 0].item() for batch in sample.batches] == [0, 1, 2]
    assert sample.num_samples == 9


class Batches:
    """An iterable that is no DataLoader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_takes_the_first_samples_of_an_iterable() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for number in range(1000):
                yield torch.full((NUM_FEATURES,), float(number)), 0

    sample = draw(DataLoader(Stream(), batch_size=2), 10, 5, seed=0)
    assert first_features(sample)[:, 0].tolist() == list(range(10))
    assert sample.num_available is None


def test_prefers_the_unaugmented_data_set_that_is_offered() -> None:
    offered = TensorDataset(torch.full((6, NUM_FEATURES), 7.0), torch.zeros(6))
    sample = draw(loader(), 10, 4, dataset=offered)
    assert (first_features(sample) == 7).all()
    assert "un-augmented" in sample.description


def test_overfit_batches_are_the_first_of_the_loader() -> None:
    sample = draw(loader(batch_size=8), 1000, 5, num_batches=2)
    assert sample.num_samples == sample.num_available == 16
    whole = torch.cat([batch[0] for batch in loader()])
    assert torch.equal(first_features(sample).sort(0).values, whole[:16].sort(0).values)
    assert "the 2 batches of overfit_batches" in sample.description
    assert draw(Batches([torch.zeros(3)] * 9), 1000, 5, num_batches=2).num_samples == 6


def test_an_iterator_raises_an_error_and_is_not_read() -> None:
    stream = iter([torch.zeros(3)] * 9)
    with pytest.raises(MisconfigurationException, match=r"can be iterated repeatedly, got the iterator list_iter"):
        draw(stream, 3, 3)
    assert len(list(stream)) == 9


def test_the_draw_shows_its_progress() -> None:
    steps: list[Any] = []
    draw(loader(), 10, 4, progress=Progress(show=lambda *step: steps.append(step[:2])))
    assert steps == [(4, 10), (8, 10), (10, 10)]


def test_empty_loader_raises_an_error() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, NUM_FEATURES)))
    with pytest.raises(ValueError, match="train: expected a data set with at least one sample, got an empty loader"):
        draw(empty, 10, 4, seed=0)


def test_an_object_other_than_a_loader_raises_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"train loader: expected an iterable, got int"):
        draw(3, 10, 4, seed=0)


def test_a_sampler_over_a_subset_keeps_the_splits_apart() -> None:
    data = TensorDataset(torch.arange(10.0).unsqueeze(1), torch.zeros(10))
    for indices in ([1, 3, 5], torch.tensor([1, 3, 5]), range(1, 6, 2)):
        sample = draw(DataLoader(data, batch_size=2, sampler=SubsetRandomSampler(indices)), 100, 4)
        assert sorted(first_features(sample).flatten().tolist()) == [1, 3, 5]
        assert sample.num_available == 3
    batched = BatchSampler(SubsetRandomSampler([2, 4]), 2, drop_last=False)
    assert sorted(first_features(draw(DataLoader(data, batch_sampler=batched), 100, 4)).flatten().tolist()) == [2, 4]


def test_a_loaders_own_generator_is_left_alone() -> None:
    data, generator = TensorDataset(torch.zeros(10, NUM_FEATURES), torch.zeros(10)), torch.Generator().manual_seed(3)
    sampler = RandomSampler(data, generator=generator)
    state = generator.get_state()
    draw(DataLoader(data, batch_sampler=BatchSampler(sampler, 4, drop_last=False)), 5, 4)
    draw(DataLoader(data, batch_size=None, sampler=sampler), 5, 4)
    assert torch.equal(generator.get_state(), state)


class NeedsWorkers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info().id
        return iter([torch.full((NUM_FEATURES,), float(worker))] * 9)


def test_data_that_only_workers_can_read_are_read_by_workers() -> None:
    assert draw(DataLoader(NeedsWorkers(), batch_size=3, num_workers=1), 6, 3).num_samples == 6
    with pytest.raises(AttributeError, match="id"):
        draw(DataLoader(NeedsWorkers(), batch_size=3), 6, 3)
