import sys
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from moe_heads.lightning_modules import DigitsDataModule


def raw(data: DigitsDataModule, split: str) -> tuple[Tensor, Tensor]:
    """Images on the scale 0 … 16, as rows, and labels."""
    dataset: Any = data.analysis_dataset(split)
    images, labels = (torch.stack(column) for column in zip(*dataset, strict=True))
    return ((images * 0.3760 + 0.3053) * 16).round().flatten(1), labels


def test_the_splits_are_the_digits_of_scikit_learn() -> None:
    data = DigitsDataModule()
    parts = [raw(data, split) for split in ("train", "val", "test")]
    assert [len(labels) for _, labels in parts] == [1258, 180, 359]
    rows = torch.cat([torch.cat([images, labels.unsqueeze(1)], 1) for images, labels in parts])
    digits = load_digits()
    expected = torch.cat([torch.tensor(digits.data), torch.tensor(digits.target).unsqueeze(1)], 1)
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_classes_are_in_proportion_in_every_split() -> None:
    data = DigitsDataModule(val_split=0.2)
    for split in ("train", "val", "test"):
        labels = raw(data, split)[1]
        shares = torch.tensor(load_digits().target).bincount() / 1797
        assert (labels.bincount() / len(labels) - shares).abs().max() < 1 / len(labels) * 2


def test_shapes_and_scale() -> None:
    data = DigitsDataModule()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, *data.image_shape)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert len(data.class_names) == data.num_classes == 10
    everything = torch.cat([raw(data, split)[0] for split in ("train", "val", "test")]) / 16
    assert float(everything.mean()) == pytest.approx(0.3053, abs=1e-4)
    assert float(everything.std()) == pytest.approx(0.3760, abs=1e-4)


def test_training_images_are_shifted_by_up_to_one_pixel_and_never_mirrored() -> None:
    data = DigitsDataModule(limit_train=60, batch_size=60)
    plain, labels = raw(data, "train")
    padded = torch.nn.functional.pad(plain.view(60, 8, 8), (1, 1, 1, 1))
    shifted = torch.stack([padded[:, i : i + 8, j : j + 8].flatten(1) for i in range(3) for j in range(3)], 1)
    images, drawn = next(iter(data.train_dataloader()))
    rows = ((images * 0.3760 + 0.3053) * 16).round().flatten(1)
    is_shift_of = (rows[:, None, None] == shifted[None]).all(-1).any(-1)
    assert is_shift_of.any(1).all()
    assert torch.equal(labels[is_shift_of.int().argmax(1)], drawn)
    assert not torch.equal(rows.sort(0).values, plain.sort(0).values)


def test_too_large_a_validation_split() -> None:
    with pytest.raises(ValueError, match=r"val_split: expected at most 0\.8, .*, got 0\.9"):
        DigitsDataModule(val_split=0.9)


def test_limit_train() -> None:
    assert len(DigitsDataModule(limit_train=100).analysis_dataset("train")) == 100
    with pytest.raises(ValueError, match="limit_train: expected at most the 1258 training images, got 1500"):
        DigitsDataModule(limit_train=1500).setup()


def test_without_scikit_learn_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn, .*, is not installed. Run `pip install moe-heads\[study\]`"):
        DigitsDataModule().setup()
