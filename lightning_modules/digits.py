"""Handwritten digits included in scikit-learn: real images without a download."""

from collections.abc import Mapping

import torch
from typing_extensions import override

from moe_heads.lightning_modules.data import ImageDataModule, RawSplit, Split, choose_stratified
from moe_heads.lightning_modules.images import ImageTransform

__all__ = ["DigitsDataModule"]

_TEST_SHARE = 0.2


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits of 8x8 gray pixels: 1,258 train, 180 validation and 359 test images by default.

    The test split is a fifth of the images. Augmentation shifts a training image by up to one pixel in each direction.
    A flip would change the meaning of a digit. Source: Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten
    Digits", the part included in scikit-learn. Needs ``pip install moe-heads[study]``.

    Args:
        batch_size: Images per batch.
        num_workers: Number of loader processes. The images are in memory, so 0 is the fastest.
        val_split: Fraction of all images used for the validation split.
        seed: Seed of the splits.
        augment: Whether to shift the training images at random.
        limit_train: Size of a random, stratified subset to train on. None uses all training images.

    Attributes:
        num_classes: 10.
        class_names: "0" … "9".
        image_shape: (1, 8, 8).

    Raises:
        ValueError: If an argument is out of range, or the training split is empty or smaller than ``limit_train``.
        ImportError: In ``setup``, if scikit-learn is not installed.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.setup()
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    num_classes = 10
    class_names = tuple(map(str, range(10)))
    image_shape = (1, 8, 8)

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        val_split: float = 0.1,
        seed: int = 42,
        augment: bool = True,
        limit_train: int | None = None,
    ) -> None:
        # mean and standard deviation over all pixels
        super().__init__((0.3053,), (0.3760,), batch_size, num_workers, val_split, seed, augment, limit_train)
        if val_split > 1 - _TEST_SHARE:
            raise ValueError(
                f"val_split: expected at most 0.8, since a fifth of the digits is the test split, got {val_split}."
            )

    @override
    def load_splits(self) -> Mapping[Split, RawSplit]:
        """Return the digits in stratified splits.

        Raises:
            ImportError: If scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ImportError(
                "DigitsDataModule: scikit-learn, which contains the images, is not installed. Run `pip install"
                " moe-heads[study]`."
            ) from error
        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        num_val, num_test = round(self.val_split * len(labels)), round(_TEST_SHARE * len(labels))
        is_test = choose_stratified(labels, num_test, self.seed)
        is_val = torch.zeros_like(is_test)
        is_val[~is_test] = choose_stratified(labels[~is_test], num_val, self.seed)
        train, val, test = (RawSplit(images[mask], labels[mask]) for mask in (~is_test & ~is_val, is_val, is_test))
        return {"train": self.limited(train), "val": val, "test": test}

    @override
    def transform(self, augment: bool) -> ImageTransform:
        """Return a transform from 0 … 16 to normalized floats, with shifts by up to one pixel if ``augment``."""
        return ImageTransform(self.mean, self.std, padding=1 if augment else 0, max_value=16.0)
