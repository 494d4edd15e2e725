"""Base of the image data modules: stratified splits, with augmentation in the training loader only."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from moe_heads.checks import check_at_least, check_at_least_one, check_flags, check_option, check_positive, check_seed
from moe_heads.lightning_modules.images import ImageFiles, ImageTransform, LabeledImages

__all__ = ["ImageDataModule", "RawSplit", "Split", "choose_stratified"]

Split = Literal["train", "val", "test"]
"""Names of the parts of a data set."""


class RawSplit(NamedTuple):
    """Images and labels of one split before any transform.

    Attributes:
        images: (N, C, H, W), uint8, or files.
        labels: (N,), int64.
    """

    images: Tensor | ImageFiles
    labels: Tensor


def choose_stratified(labels: Tensor, num_chosen: int, seed: int) -> Tensor:
    """Choose ``num_chosen`` random samples with the class proportions of the data set, as a mask.

    The class sizes are rounded by the largest remainder, so that they add up.

    Args:
        labels: (N,), int64.
        num_chosen: Number of samples to choose, 0 … N.
        seed: Seed. The choice depends only on it and on the labels.

    Returns:
        (N,), bool.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[choose_stratified(labels, 3, seed=0)]
        tensor([0, 0, 1])
    """
    counts = labels.bincount()
    shares = counts.double() * num_chosen / len(labels)
    quotas = shares.floor().long()
    largest_remainders = (shares - quotas).argsort(descending=True, stable=True)
    quotas[largest_remainders[: num_chosen - int(quotas.sum())]] += 1
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas.tolist()):
        members = (labels == label).nonzero().flatten()
        mask[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return mask


class ImageDataModule(LightningDataModule, ABC):
    """Base of the image data modules: three splits, with augmentation in the training loader only.

    Each split has its own data set and each data set its own transform, so the splits are independent. Batches are
    ``(images (B, C, H, W) float32, labels (B,) int64)``. Shuffling and augmentation use the global generator of torch
    (``seed_everything``). The assignment of images to splits depends only on ``seed``.

    Args:
        mean: Mean of each channel on the scale of 0 to 1.
        std: Standard deviation of each channel on the scale of 0 to 1.
        batch_size: Images per batch.
        num_workers: Number of loader processes. 0 loads in the main process, the fastest for images in memory.
        val_split: Fraction of the training images used for the validation split.
        seed: Seed of the splits, 42 as in arXiv 2601.15021.
        augment: Whether to augment the training split.
        limit_train: Size of a random, stratified subset to train on. None uses all training images.

    Attributes:
        num_classes: C.
        class_names: Names of the classes in the order of the labels.
        image_shape: (C, H, W).

    Raises:
        ValueError: If an argument is out of its range.
    """

    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        num_workers: int,
        val_split: float,
        seed: int,
        augment: bool,
        limit_train: int | None,
    ) -> None:
        super().__init__()
        check_at_least_one(batch_size=batch_size)
        check_at_least(0, num_workers=num_workers)
        check_positive(val_split=val_split)
        if val_split >= 1:
            raise ValueError(f"val_split: expected a number between 0 and 1, got {val_split!r}.")
        check_at_least_one(or_none=True, limit_train=limit_train)
        check_seed(seed)
        check_flags(augment=augment)
        if (
            not len(mean) == len(std)
            or not all(map(math.isfinite, (*mean, *std)))
            or not all(deviation > 0 for deviation in std)
        ):
            raise ValueError(f"mean, std: expected one number per channel, std above 0, got {mean!r}, {std!r}.")
        self.mean, self.std = tuple(mean), tuple(std)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_split = val_split
        self.seed = seed
        self.augment = augment
        self.limit_train = limit_train
        self._splits: Mapping[Split, RawSplit] | None = None
        # without the seed of the splits, which a table of runs would present as the seed of the training
        self.save_hyperparameters("batch_size", "augment", "limit_train")

    @abstractmethod
    def load_splits(self) -> Mapping[Split, RawSplit]:
        """Return all three splits. Called once."""

    @abstractmethod
    def transform(self, augment: bool) -> ImageTransform:
        """Return a new transform of raw images, with or without augmentation."""

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load the images on the first call."""
        if self._splits is None:
            self._splits = self.load_splits()

    def analysis_dataset(self, split: Split) -> Dataset[tuple[Tensor, Tensor]]:
        """Return the images of a split without augmentation, in a fixed order.

        Args:
            split: "train", "val" or "test".

        Returns:
            Pairs of an image (C, H, W) and its label.

        Raises:
            ValueError: If there is no split of that name.
        """
        return self._dataset(split, augment=False)

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a loader of the training images, shuffled and augmented."""
        return self._loader(self._dataset("train", self.augment), shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a loader of the validation images."""
        return self._loader(self._dataset("val", augment=False))

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a loader of the test images."""
        return self._loader(self._dataset("test", augment=False))

    def split_off_validation(self, images: Tensor | ImageFiles, labels: Tensor) -> tuple[RawSplit, RawSplit]:
        """Split labeled images into a training and a validation split."""
        is_val = choose_stratified(labels, round(self.val_split * len(labels)), self.seed)
        return _select(images, labels, ~is_val), _select(images, labels, is_val)

    def limited(self, train: RawSplit) -> RawSplit:
        """Return the training split, reduced to ``limit_train`` images."""
        if self.limit_train is None:
            return train
        if self.limit_train > len(train.labels):
            raise ValueError(
                f"limit_train: expected at most the {len(train.labels)} training images, got {self.limit_train}."
            )
        return _select(*train, choose_stratified(train.labels, self.limit_train, self.seed))

    def _dataset(self, split: Split, augment: bool) -> LabeledImages:
        self.setup()
        assert self._splits is not None
        check_option("split", split, self._splits)
        return LabeledImages(*self._splits[split], self.transform(augment))

    def _loader(self, dataset: LabeledImages, shuffle: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        # keyword arguments: Lightning rebuilds the loader with a distributed sampler and shuffle=False
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _select(images: Tensor | ImageFiles, labels: Tensor, mask: Tensor) -> RawSplit:
    chosen = images[mask] if isinstance(images, Tensor) else images.select(mask.nonzero().flatten())
    return RawSplit(chosen, labels[mask])
