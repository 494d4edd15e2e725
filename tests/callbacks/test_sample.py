"""The sample of a split."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from moe_heads.callbacks.sample import draw_sample
from tests.support.lightning_models import NUM_FEATURES, loader


class FakeTrainer:
    """What draw_sample reads of a trainer."""

    fit_loop = SimpleNamespace(_data_source=None)

    def __init__(self, train: Any, datamodule: Any = None) -> None:
        self.train_dataloader, self.datamodule = train, datamodule


def first_features(sample: Any) -> torch.Tensor:
    return torch.cat([batch[0] for batch in sample.batches])


def test_is_a_function_of_the_seed_and_not_of_the_loaders_order() -> None:
    plain, shuffled = FakeTrainer(loader()), FakeTrainer(loader(shuffle=True, batch_size=3))
    one, two = draw_sample(plain, "train", 10, 4, seed=0), draw_sample(shuffled, "train", 10, 7, seed=0)
    assert torch.equal(first_features(one), first_features(two))
    assert [len(batch[1]) for batch in one.batches] == [4, 4, 2]
    assert not torch.equal(first_features(one), first_features(draw_sample(plain, "train", 10, 4, seed=1)))
    assert (one.num_samples, one.num_available) == (10, 40)
    assert one.description.startswith("10 of 40, drawn with seed 0")


def test_has_no_sample_twice_and_all_when_there_are_few() -> None:
    sample = draw_sample(FakeTrainer(loader(num_samples=9)), "train", 1000, 4, seed=0)
    assert sample.num_samples == 9
    assert len(first_features(sample).unique(dim=0)) == 9


def test_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    draw_sample(FakeTrainer(loader(shuffle=True)), "train", 10, 4, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"a": x}, lambda x: ((x,),)])
def test_takes_the_first_of_a_collection(wrap: Any) -> None:
    assert draw_sample(FakeTrainer(wrap(loader())), "train", 10, 4, seed=0).num_samples == 10


def test_takes_the_first_samples_of_an_iterable() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for number in range(1000):
                yield torch.full((NUM_FEATURES,), float(number)), 0

    sample = draw_sample(FakeTrainer(DataLoader(Stream(), batch_size=2)), "train", 10, 5, seed=0)
    assert first_features(sample)[:, 0].tolist() == list(range(10))
    assert sample.num_available is None


def test_prefers_the_unaugmented_data_of_the_data_module() -> None:
    class Data:
        def analysis_dataset(self, split: str) -> Any:
            return TensorDataset(torch.full((6, NUM_FEATURES), 7.0), torch.zeros(6))

    sample = draw_sample(FakeTrainer(loader(), Data()), "train", 10, 4, seed=0)
    assert (first_features(sample) == 7).all()
    assert "un-augmented" in sample.description


def test_empty_loader_is_refused() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, NUM_FEATURES)))
    with pytest.raises(ValueError, match="train: expected a data set with at least one sample; got an empty loader"):
        draw_sample(FakeTrainer(empty), "train", 10, 4, seed=0)


def test_something_else_than_a_loader_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"train loader: expected a torch DataLoader .*; got generator"):
        draw_sample(FakeTrainer(x for x in range(3)), "train", 10, 4, seed=0)
