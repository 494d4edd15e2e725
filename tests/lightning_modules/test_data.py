from collections.abc import Mapping
from typing import Any

import pytest
import torch

from moe_heads.lightning_modules import ImageDataModule, ImageTransform, LabeledImages
from moe_heads.lightning_modules.data import RawSplit, Split, choose_stratified

SIDE = 6


class Numbered(ImageDataModule):
    """Image i of the training folder is filled with the value i, so that a crop of it still tells its index."""

    num_classes = 4
    class_names = ("a", "b", "c", "d")
    image_shape = (1, SIDE, SIDE)

    def __init__(self, num_images: int = 200, **options: Any) -> None:
        defaults = {"batch_size": 32, "num_workers": 0, "val_split": 0.25, "seed": 42, "augment": True}
        super().__init__((0.0,), (1.0,), **(defaults | {"limit_train": None} | options))
        self.num_images = num_images

    def load_splits(self) -> Mapping[Split, RawSplit]:
        values = torch.arange(1, self.num_images + 1, dtype=torch.uint8)
        images = values.view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE).contiguous()
        train, val = self.split_off_validation(images, torch.arange(self.num_images) % 4)
        test = RawSplit(torch.full((8, 1, SIDE, SIDE), 255, dtype=torch.uint8), torch.arange(8) % 4)
        return {"train": self.limited(train), "val": val, "test": test}

    def transform(self, augment: bool) -> ImageTransform:
        return ImageTransform(self.mean, self.std, padding=2 if augment else 0, flip=augment, max_value=1.0)


def pixels_by_index(loader: Any) -> dict[int, torch.Tensor]:
    images = torch.cat([images for images, _ in loader])
    return {int(image.max()): image for image in images}


def equal(first: dict[int, torch.Tensor], second: dict[int, torch.Tensor]) -> list[bool]:
    assert first.keys() == second.keys()
    return [torch.equal(first[index], second[index]) for index in first]


def test_augmentation_reaches_the_training_loader() -> None:
    data = Numbered()
    loader = data.train_dataloader()
    first, second = pixels_by_index(loader), pixels_by_index(loader)
    same = equal(first, second)
    # one of 25 crops each time: about six of the 150 images are cropped alike twice
    assert len(same) == 150
    assert sum(same) < 30
    for index, image in first.items():
        rows, columns = (image[0] > 0).any(1), (image[0] > 0).any(0)
        assert image[0][rows][:, columns].eq(index).all()
        assert SIDE - 2 <= int(rows.sum()) <= SIDE
        assert SIDE - 2 <= int(columns.sum()) <= SIDE


def test_augmentation_reaches_nothing_else() -> None:
    data = Numbered()
    next(iter(data.train_dataloader()))  # a shared transform would have been switched on by now
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        for images, _ in loader:
            assert torch.equal(images, images.amax((1, 2, 3), keepdim=True).expand_as(images))
        assert all(equal(pixels_by_index(loader), pixels_by_index(loader)))
        analyzed = data.analysis_dataset(split)
        assert torch.equal(torch.stack([x for x, _ in analyzed]), torch.cat([x for x, _ in loader]))
    train = data.analysis_dataset("train")
    assert all(torch.equal(image, image.max().expand_as(image)) for image, _ in train)


def test_asking_for_the_analysis_does_not_switch_augmentation_off() -> None:
    data = Numbered()
    loader = data.train_dataloader()
    data.analysis_dataset("train")
    data.val_dataloader()
    assert sum(equal(pixels_by_index(loader), pixels_by_index(loader))) < 30


def test_without_augmentation_the_training_images_are_plain() -> None:
    data = Numbered(augment=False)
    loader = data.train_dataloader()
    assert all(equal(pixels_by_index(loader), pixels_by_index(loader)))
    images = torch.cat([images for images, _ in loader])
    assert torch.equal(images, images.amax((1, 2, 3), keepdim=True).expand_as(images))


def test_splits_share_no_transform() -> None:
    data = Numbered(augment=False)
    datasets = [loader.dataset for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    datasets += [data.analysis_dataset("train"), data.analysis_dataset("val")]
    assert all(isinstance(dataset, LabeledImages) for dataset in datasets)
    assert len({id(dataset.transform) for dataset in datasets}) == len(datasets)


def test_splits_are_disjoint_complete_stratified_and_a_function_of_the_seed() -> None:
    def indices(seed: int, split: Split) -> list[int]:
        return [int(image.max()) for image, _ in Numbered(seed=seed).analysis_dataset(split)]

    train, val = indices(42, "train"), indices(42, "val")
    assert len(val) == 50
    assert sorted(train + val) == list(range(1, 201))
    assert indices(42, "val") == val
    assert indices(43, "val") != val
    labels = torch.stack([label for _, label in Numbered().analysis_dataset("val")])
    assert labels.bincount().tolist() in ([13, 13, 12, 12],)


def test_limit_train_takes_a_balanced_subset_of_the_training_split_only() -> None:
    data = Numbered(limit_train=40)
    full = {int(image.max()) for image, _ in Numbered().analysis_dataset("train")}
    subset = [int(image.max()) for image, _ in data.analysis_dataset("train")]
    assert len(set(subset)) == 40
    assert set(subset) < full
    assert torch.stack([label for _, label in data.analysis_dataset("train")]).bincount().tolist() == [10] * 4
    assert len(data.analysis_dataset("val")) == 50
    assert subset == [int(image.max()) for image, _ in Numbered(limit_train=40).analysis_dataset("train")]


def test_images_are_loaded_once() -> None:
    data = Numbered()
    data.setup("fit")
    first = data.analysis_dataset("train")
    data.setup("test")
    assert data.train_dataloader().dataset.images is first.images


def test_training_images_are_shuffled_and_the_others_not() -> None:
    data = Numbered()
    loader = data.train_dataloader()
    first, second = (torch.cat([labels for _, labels in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    val = torch.cat([images.amax((1, 2, 3)) for images, _ in data.val_dataloader()])
    assert torch.equal(val, val.sort().values)


def test_workers_augment_with_seeds_of_their_own() -> None:
    images = torch.cat([images for images, _ in Numbered(num_images=64, num_workers=2).train_dataloader()])
    # the two workers' batches, each image reduced to its mask: equal seeds would crop both batches alike
    masks = (images > 0).float()
    assert not torch.equal(masks[:24], masks[24:48])


def test_hyper_parameters_for_the_table_of_runs() -> None:
    assert dict(Numbered(limit_train=5).hparams) == {"batch_size": 32, "augment": True, "limit_train": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"seed": None}, "seed: expected an int from 0 to .* got None"),
        ({"augment": "False"}, "augment: expected True or False, got 'False'"),
        ({"num_workers": -1}, "num_workers: expected an integer of at least 0, got -1"),
        ({"val_split": 0.0}, r"val_split: expected a finite number above 0, got 0\.0"),
        ({"val_split": 1.0}, r"val_split: expected a number between 0 and 1, got 1\.0"),
        ({"limit_train": 0}, "limit_train: expected an integer of at least 1 or None, got 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Numbered(**options)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))])
def test_bad_normalization(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    class Other(Numbered):
        def __init__(self) -> None:
            ImageDataModule.__init__(self, mean, std, 32, 0, 0.25, 42, True, None)

    with pytest.raises(ValueError, match="mean, std: expected one number per channel, std above 0, got"):
        Other()


def test_limit_train_above_the_split() -> None:
    with pytest.raises(ValueError, match="limit_train: expected at most the 150 training images, got 151"):
        Numbered(limit_train=151).setup()


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="split: expected one of 'train', 'val', 'test', got 'valid'"):
        Numbered().analysis_dataset("valid")


@pytest.mark.parametrize("num_chosen", [0, 1, 7, 33, 99, 100])
def test_stratified_choice_is_exact_and_proportional(num_chosen: int) -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 19 + [4])[torch.randperm(100)]
    mask = choose_stratified(labels, num_chosen, seed=1)
    assert int(mask.sum()) == num_chosen
    shares = labels.bincount() * num_chosen / 100
    assert (labels[mask].bincount(minlength=5) - shares).abs().max() < 1


def test_stratified_choice_is_uniform_within_a_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 20)
    counts = sum(choose_stratified(labels, 15, seed).double() for seed in range(400))
    assert (counts - 200).abs().max() < 5 * (400 * 0.25) ** 0.5
