import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe_heads.lightning_modules import ImageFiles, ImageFolderDataModule

SIZES = {"train": 10, "test": 3}
CLASSES = ("ant", "bee")


def write(path: Path, value: int, height: int = 6, width: int = 8) -> None:
    Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images filled with a value of their own: 1 … 20 for training, 101 … 106 for the test."""
    for split, num_images in SIZES.items():
        for label, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(num_images):
                value = (0 if split == "train" else 100) + label * num_images + i + 1
                write(tmp_path / split / name / f"{i:02d}.png", value)
    return tmp_path


def module(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **({"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "batch_size": 8} | options))


def values(data: ImageFolderDataModule, split: str) -> dict[int, int]:
    """Label of each image by its value."""
    return {round(float(image.max())): int(label) for image, label in data.analysis_dataset(split)}


@pytest.mark.parametrize("memory_limit_mb", [1000, 0])
def test_splits_labels_and_pixels(root: Path, memory_limit_mb: int) -> None:
    data = module(root, val_split=0.2, memory_limit_mb=memory_limit_mb)
    assert (data.num_classes, data.class_names, data.image_shape) == (2, CLASSES, (3, 6, 8))
    train, val, test = (values(data, split) for split in ("train", "val", "test"))
    assert (len(train), len(val)) == (16, 4)
    assert train | val == {i: int(i > 10) for i in range(1, 21)}
    assert test == {i: int(i > 103) for i in range(101, 107)}
    assert sorted(val.values()) == [0, 0, 1, 1]
    dataset = data.analysis_dataset("train")
    assert isinstance(dataset.images, ImageFiles if memory_limit_mb == 0 else torch.Tensor)
    image, _ = dataset[0]
    assert image.shape == data.image_shape
    torch.testing.assert_close(image, torch.full_like(image, float(image.max())))


def test_both_ways_of_holding_the_images_serve_the_same(root: Path) -> None:
    batches = []
    for memory_limit_mb in (1000, 0):
        torch.manual_seed(1)
        batches.append(list(module(root, memory_limit_mb=memory_limit_mb).train_dataloader()))
    for (images, labels), (other_images, other_labels) in zip(*batches, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_training_images_are_augmented_and_the_others_not(root: Path) -> None:
    data = module(root, crop_padding=2, batch_size=20)
    first, second = (next(iter(data.train_dataloader()))[0] for _ in range(2))
    assert (first == 0).any()
    order = [images.amax((1, 2, 3)).argsort() for images in (first, second)]
    assert not torch.equal(first[order[0]], second[order[1]])
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for images, _ in loader:
            assert (images > 0).all()


def test_classes_are_mixed_so_that_the_first_batches_are_a_fair_sample(root: Path) -> None:
    first, again, other = (
        [int(label) for _, label in module(root, seed=seed).analysis_dataset("train")] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first not in (sorted(first), sorted(first, reverse=True))


def test_only_training_images_are_mirrored(root: Path) -> None:
    for split in ("train", "test"):
        for path in (root / split).glob("*/*.png"):
            pixels = np.zeros((6, 8, 3), dtype=np.uint8)
            pixels[:, :4] = 255  # bright on the left
            Image.fromarray(pixels).save(path)
    data = module(root, crop_padding=0, val_split=0.4)
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    is_mirrored = [torch.cat([images[:, 0, 0, 0] == 0 for images, _ in loader]) for loader in loaders]
    assert [bool(flags.any()) for flags in is_mirrored] == [True, False, False]
    assert not is_mirrored[0].all()


def test_a_val_folder_is_used_as_it_is(root: Path) -> None:
    shutil.copytree(root / "test", root / "val")
    data = module(root)
    assert values(data, "val") == values(data, "test")
    assert len(values(data, "train")) == 20


def test_limit_train_decodes_and_serves_a_subset(root: Path) -> None:
    data = module(root, limit_train=6)
    train = values(data, "train")
    assert sorted(train.values()) == [0, 0, 0, 1, 1, 1]
    assert set(train) < set(values(module(root), "train"))


def test_image_size(root: Path) -> None:
    write(root / "train" / "ant" / "large.jpg", 50, 20, 30)
    data = module(root, image_size=4)
    assert data.image_shape == (3, 4, 4)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape[1:] == (3, 4, 4)


def test_hidden_folders_and_other_files_are_passed_over(root: Path) -> None:
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("ants")
    (root / "train" / "readme.md").write_text("insects")
    assert len(values(module(root), "train")) == 18


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root: expected class folders in .*nowhere/train, got no such folder"):
        module(tmp_path / "nowhere")


def test_missing_test_folder(root: Path) -> None:
    shutil.rmtree(root / "test")
    with pytest.raises(ValueError, match=r"root: expected class folders in .*/test, got no such folder"):
        module(root)


def test_no_class_folders(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"root: expected at least two class folders in .*/train, got none"):
        module(tmp_path)


@pytest.mark.parametrize("split", ["val", "test"])
def test_other_classes_in_another_split(root: Path, split: str) -> None:
    shutil.copytree(root / "test", root / "val")
    (root / split / "bee").rename(root / split / "wasp")
    with pytest.raises(ValueError, match=rf"the same classes in .*/{split} as in train, got .* one of them: bee, wasp"):
        module(root)


def test_empty_class_folder(root: Path) -> None:
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()
    with pytest.raises(ValueError, match=r"root: expected images \(.jpg .*\) in .*train/bee, got none"):
        module(root)


@pytest.mark.parametrize("memory_limit_mb", [1000, 0])
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_of_another_size_is_found_in_setup(root: Path, split: str, memory_limit_mb: int) -> None:
    write(root / split / "bee" / "odd.png", 1, 6, 7)
    data = module(root, memory_limit_mb=memory_limit_mb, val_split=0.05)
    with pytest.raises(
        ValueError, match=r"odd\.png: expected 8x6 pixels as in the first image, got 7x6\. Pass image_size"
    ):
        data.setup()


@pytest.mark.parametrize("memory_limit_mb", [1000, 0])
def test_a_file_that_is_no_image(root: Path, memory_limit_mb: int) -> None:
    (root / "test" / "bee" / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match=r"bad\.png: expected a readable image, got an error: "):
        module(root, memory_limit_mb=memory_limit_mb).setup()
    (root / "train" / "ant" / "00.png").write_text("no image")
    with pytest.raises(ValueError, match=r"00\.png: expected a readable image, got an error: "):
        module(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size: expected an integer of at least 1 or None, got 0"),
        ({"crop_padding": -1}, "crop_padding: expected an integer of at least 0, got -1"),
        ({"memory_limit_mb": -2}, "memory_limit_mb: expected at least 0, got -2"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean, std: expected three numbers"),
        ({"mean": (0.5, 0.5, math.nan)}, "mean, std: expected one number per channel"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(root, **options)
