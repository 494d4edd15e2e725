"""CIFAR-10 from torchvision, decoded in memory."""

import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url
from typing_extensions import override

from moe_heads.checks import check_at_least, check_option
from moe_heads.lightning_modules.data import ImageDataModule, RawSplit, Split
from moe_heads.lightning_modules.images import CropBorder, ImageTransform

__all__ = ["CIFAR10_MEAN", "CIFAR10_STD", "CIFAR10DataModule"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
"""Mean of the red, green and blue pixels on the scale of 0 to 1, as in arXiv 2601.15021."""

CIFAR10_STD = (0.2470, 0.2435, 0.2616)
"""Standard deviation of the red, green and blue pixels on the scale of 0 to 1, as in arXiv 2601.15021."""


class CIFAR10DataModule(ImageDataModule):
    """60,000 color images of 32x32 pixels: 45,000 train, 5,000 validation and 10,000 test images by default.

    Augmentation is a random crop from the image with 4 black pixels on every side, and a random flip. The images
    take 184 MB of memory. They are downloaded (170 MB) if they are not in ``data_dir``. Without a network, put the
    archive ``cifar-10-python.tar.gz`` or its folder ``cifar-10-batches-py`` there.

    Args:
        data_dir: Folder of the data. It is created if needed.
        batch_size: Images per batch, 128 as in arXiv 2601.15021.
        num_workers: Number of loader processes. The images are in memory, so 0 is the fastest on a small machine.
        val_split: Fraction of the 50,000 training images used for the validation split.
        seed: Seed of the splits.
        augment: Whether to crop and flip the training images at random.
        limit_train: Size of a random, stratified subset to train on. None uses all training images.
        crop_padding: Largest shift of a crop in pixels, 0 for no crop.
        crop_border: Pixels of a crop outside the image: "black", or mirrored at the edge ("reflect").

    Attributes:
        num_classes: 10.
        class_names: "airplane" … "truck".
        image_shape: (3, 32, 32).

    Raises:
        ValueError: If an argument is out of its range.
    """

    num_classes = 10
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    image_shape = (3, 32, 32)

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        val_split: float = 0.1,
        seed: int = 42,
        augment: bool = True,
        limit_train: int | None = None,
        crop_padding: int = 4,
        crop_border: CropBorder = "black",
    ) -> None:
        super().__init__(CIFAR10_MEAN, CIFAR10_STD, batch_size, num_workers, val_split, seed, augment, limit_train)
        self.data_dir = Path(data_dir)
        check_at_least(0, crop_padding=crop_padding)
        check_option("crop_border", crop_border, get_args(CropBorder))
        self.crop_padding, self.crop_border = crop_padding, crop_border

    @override
    def prepare_data(self) -> None:
        """Download or extract the data unless they are in place.

        Raises:
            RuntimeError: If this fails. ``data_dir`` then has no new files.
        """
        folder = self.data_dir / CIFAR10.base_folder
        archive = self.data_dir / CIFAR10.filename
        if folder.exists():
            return
        if archive.exists() and not check_integrity(archive, CIFAR10.tgz_md5):
            raise RuntimeError(f"{archive} is damaged (its MD5 is not {CIFAR10.tgz_md5}). Delete or replace it.")
        is_new = not self.data_dir.exists()
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            # a staging folder next to the final one, so that the final one appears in one step or not at all
            with tempfile.TemporaryDirectory(prefix=".cifar10-", dir=self.data_dir) as staging:
                if not archive.exists():
                    download_url(CIFAR10.url, staging, CIFAR10.filename, CIFAR10.tgz_md5)
                    archive = Path(staging, CIFAR10.filename)
                with tarfile.open(archive) as tar:
                    tar.extractall(staging, filter="data")
                os.replace(Path(staging, CIFAR10.base_folder), folder)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            if is_new and self.data_dir.is_dir() and not any(self.data_dir.iterdir()):
                self.data_dir.rmdir()
            raise RuntimeError(
                f"CIFAR-10 could not be downloaded to {self.data_dir.absolute()}: {error}. Without a network, put "
                f"{CIFAR10.filename} ({CIFAR10.url}, MD5 {CIFAR10.tgz_md5}) into that folder, or use "
                "ImageFolderDataModule on a tree of image files."
            ) from error

    @override
    def load_splits(self) -> Mapping[Split, RawSplit]:
        """Return the 50,000 training images, with a stratified validation split, and the 10,000 test images."""
        self.prepare_data()
        train, val = self.split_off_validation(*self._load(train=True))
        return {"train": self.limited(train), "val": val, "test": self._load(train=False)}

    @override
    def transform(self, augment: bool) -> ImageTransform:
        """Return a transform to normalized floats, with random crops and flips if ``augment``."""
        padding = self.crop_padding if augment else 0
        return ImageTransform(self.mean, self.std, padding, flip=augment, border=self.crop_border)

    def _load(self, train: bool) -> RawSplit:
        try:
            data = CIFAR10(self.data_dir, train=train)
        except RuntimeError as error:
            folder = self.data_dir / CIFAR10.base_folder
            raise RuntimeError(f"{folder} is incomplete or damaged. Delete it to download CIFAR-10 again.") from error
        return RawSplit(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))
