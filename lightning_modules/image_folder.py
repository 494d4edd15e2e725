"""Tree of image files with one folder per class, decoded in memory if it fits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from typing_extensions import override

from moe_heads.checks import check_at_least, check_at_least_one, check_option
from moe_heads.lightning_modules.cifar10 import CIFAR10_MEAN, CIFAR10_STD
from moe_heads.lightning_modules.data import ImageDataModule, RawSplit, Split
from moe_heads.lightning_modules.images import CropBorder, ImageFiles, ImageTransform, check_size

__all__ = ["ImageFolderDataModule"]


class ImageFolderDataModule(ImageDataModule):
    """Images from ``root/train/<class>``, ``root/test/<class>`` and, if it exists, ``root/val/<class>``.

    Without ``root/val`` the validation split is taken from the training images. The constructor checks the tree. A
    split of at most ``memory_limit_mb`` is decoded once into memory. A larger split is decoded at every access, so
    raise ``num_workers`` for it. The images are in a random order fixed by ``seed``, not class by class. Augmentation
    is a random crop from the image with ``crop_padding`` additional pixels on every side, and a random flip.

    Args:
        root: Folder with the tree.
        image_size: Side in pixels. The shorter side is scaled to it, and the center is cropped. None keeps the images,
            which must all have the same size.
        mean: Mean of red, green and blue on the scale of 0 to 1. The default is that of CIFAR-10.
        std: Standard deviation of the same. The default is that of CIFAR-10.
        crop_padding: Pixels added before the random crop, 0 for no crop. 4 is usual for 32x32 pixels.
        memory_limit_mb: Largest decoded split that is kept in memory, in MB (10^6 bytes).
        batch_size: Images per batch.
        num_workers: Number of loader processes. 0 is the fastest for images in memory.
        val_split: Fraction of the training images used for the validation split if there is no ``root/val``.
        seed: Seed of the splits and of the order of the images.
        augment: Whether to crop and flip the training images at random.
        limit_train: Size of a random, stratified subset to train on. None uses all training images.
        crop_border: Pixels of a crop outside the image: "black", or mirrored at the edge ("reflect").

    Attributes:
        num_classes: Number of class folders.
        class_names: Names of the class folders, sorted.
        image_shape: (3, H, W).
        suffixes: File suffixes, such as ".jpg", sorted.

    Raises:
        ValueError: If an argument is out of range, a folder is missing or empty, or (in ``setup``) a file is not an
            image or the images differ in size without ``image_size``.
    """

    def __init__(
        self,
        root: str,
        image_size: int | None = None,
        mean: tuple[float, float, float] = CIFAR10_MEAN,
        std: tuple[float, float, float] = CIFAR10_STD,
        crop_padding: int = 4,
        memory_limit_mb: int = 1000,
        batch_size: int = 128,
        num_workers: int = 0,
        val_split: float = 0.1,
        seed: int = 42,
        augment: bool = True,
        limit_train: int | None = None,
        crop_border: CropBorder = "black",
    ) -> None:
        super().__init__(mean, std, batch_size, num_workers, val_split, seed, augment, limit_train)
        if len(mean) != 3:
            raise ValueError(f"mean, std: expected three numbers (red, green, blue), got {mean!r}, {std!r}.")
        check_at_least_one(or_none=True, image_size=image_size)
        check_at_least(0, crop_padding=crop_padding)
        if not memory_limit_mb >= 0:
            raise ValueError(f"memory_limit_mb: expected at least 0, got {memory_limit_mb!r}.")
        self.root = Path(root)
        self.image_size = image_size
        self.crop_padding = crop_padding
        check_option("crop_border", crop_border, get_args(CropBorder))
        self.crop_border = crop_border
        self.memory_limit_mb = memory_limit_mb
        self.class_names = _class_names(self.root / "train")
        self.num_classes = len(self.class_names)
        names: list[Split] = ["train", "val", "test"] if (self.root / "val").exists() else ["train", "test"]
        self._files = {name: _list_files(self.root / name, self.class_names) for name in names}
        self.suffixes = tuple(sorted({path.suffix.lower() for paths, _ in self._files.values() for path in paths}))
        width, height = (image_size, image_size) if image_size else _size(self._files["train"][0][0])
        self.image_shape = (3, height, width)

    @override
    def load_splits(self) -> Mapping[Split, RawSplit]:
        """Return the splits, decoded if they fit in memory."""
        _, height, width = self.image_shape
        splits: dict[Split, RawSplit] = {}
        for name, (paths, labels) in self._files.items():
            files = ImageFiles(paths, height, width, resize=self.image_size is not None)
            # shuffled, since the files are listed class by class and an analysis may use only the first batches
            order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(self.seed))
            splits[name] = RawSplit(files.select(order), torch.tensor(labels)[order])
        if "val" not in splits:
            splits["train"], splits["val"] = self.split_off_validation(*splits["train"])
        splits["train"] = self.limited(splits["train"])
        return {name: self._in_memory(split) for name, split in splits.items()}

    @override
    def transform(self, augment: bool) -> ImageTransform:
        """Return a transform to normalized floats, with random crops and flips if ``augment``."""
        padding = self.crop_padding if augment else 0
        return ImageTransform(self.mean, self.std, padding, flip=augment, border=self.crop_border)

    def _in_memory(self, split: RawSplit) -> RawSplit:
        files, labels = split
        assert isinstance(files, ImageFiles)
        num_bytes = len(files) * 3 * files.height * files.width
        if num_bytes <= self.memory_limit_mb * 1e6:
            return RawSplit(files[torch.arange(len(files))], labels)
        if not files.resize:
            # read from the headers now: an image of a different size would otherwise stop the training later
            for path in files.paths:
                check_size(path, _size(path), (files.width, files.height))
        return split


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise ValueError(f"root: expected class folders in {folder}, got no such folder. Create it or correct root.")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"root: expected at least two class folders in {folder}, got {names or 'none'}.")
    return tuple(names)


def _list_files(folder: Path, class_names: Sequence[str]) -> tuple[list[Path], list[int]]:
    """Return the files and labels of a split, in a fixed order."""
    found = _class_names(folder)
    if found != tuple(class_names):
        odd = sorted(set(found) ^ set(class_names))
        raise ValueError(
            f"root: expected the same classes in {folder} as in train, got classes in only one of them:"
            f" {', '.join(odd)}. Rename, add or remove their folders."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise ValueError(
                f"root: expected images ({' '.join(IMG_EXTENSIONS)}) in {folder / name}, got none. Add images or remove"
                " the folder."
            )
        paths += files
        labels += [label] * len(files)
    return paths, labels


def _size(path: Path) -> tuple[int, int]:
    """Read (width, height) from the header of a file."""
    try:
        with Image.open(path) as image:
            return image.size
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"{path}: expected a readable image, got an error: {error}. Replace or remove the file."
        ) from error
