"""Data, model and trainer of a run."""

import hashlib
import re
from typing import Any, Literal, cast

import torch
from lightning import pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from moe_heads import NOISY_TOP_K, Dense, Head, capacity, match_capacity
from moe_heads.lightning_modules import (
    CIFAR10DataModule,
    DigitsDataModule,
    FastCNN,
    ImageDataModule,
    ImageFolderDataModule,
    LabeledImages,
    MoEClassifier,
    build_backbone,
    fastest_precision,
)
from study.options import Options

# enough for the second moments of 12 numbers: one image has about a thousand patches
_WHITENING_IMAGES = 2000


def build_data(options: Options) -> ImageDataModule:
    """Create the data module and load its images, so that errors occur before anything is written.

    Raises:
        ValueError: If the data cannot be loaded or are not suitable for a study.
    """
    kind, _, path = options.data.partition(":")
    shared: dict[str, Any] = {
        "batch_size": options.batch_size,
        "limit_train": options.limit_train,
        "augment": options.augment,
    }
    crops: dict[str, Any] = {"crop_padding": options.crop_padding, "crop_border": options.crop_border}
    data: ImageDataModule
    try:
        if kind == "digits":
            data = DigitsDataModule(**shared)
        elif kind == "cifar10":
            data = CIFAR10DataModule(**shared, **crops)
        else:
            data = ImageFolderDataModule(path, image_size=options.image_size, **shared, **crops)
        data.prepare_data()
        data.setup()
    except ValueError as error:
        # the argument root of the data module is a part of --data on the command line
        raise ValueError(re.sub("^root: ", "--data: ", str(error))) from error
    return data


def describe_data(options: Options, data: ImageDataModule) -> dict[str, Any]:
    """Describe the data of a study: sizes, file types and a digest of the images."""
    kind, digest = options.data.partition(":")[0], hashlib.sha256()
    sizes: dict[str, int] = {}
    for split in ("train", "val", "test"):
        part = data.analysis_dataset(split)
        assert isinstance(part, LabeledImages)
        sizes[split] = len(part)
        digest.update(part.labels.numpy().tobytes())
        if isinstance(part.images, torch.Tensor):
            digest.update(part.images.contiguous().numpy().tobytes())
        else:
            digest.update("\n".join(f"{path.name} {path.stat().st_size}" for path in part.images.paths).encode())
    suffixes = data.suffixes if isinstance(data, ImageFolderDataModule) else ()
    about = {"kind": kind, "name": options.data_name, "files": list(suffixes), "num_classes": data.num_classes}
    return {**about, **sizes, "sha256": digest.hexdigest()[:16]}


def check_accelerator(options: Options) -> None:
    """Raise an error if the accelerator is not available."""
    try:
        device_of(options)
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--accelerator: expected an available accelerator, got {options.accelerator!r}: {error}"
        ) from error


def precision_of(options: Options) -> Literal["bf16-mixed", "32-true"]:
    """Return the precision for the Trainer: that of the options, or the fastest on the device."""
    return fastest_precision(device_of(options)) if options.precision == "auto" else options.precision


def device_of(options: Options) -> torch.device:
    """Return the device of training and analyses."""
    trainer = pl.Trainer(
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return trainer.strategy.root_device


def build_model(options: Options, head: str, data: ImageDataModule) -> MoEClassifier:
    """Build a classifier with a head whose total parameters match the dense head of ``head_width`` units.

    The backbone is initialized first, so that it starts with the same weights for every head of a seed.
    """
    channels, height, _ = data.image_shape
    backbone = build_backbone(options.backbone, channels, height)
    if options.whiten:
        if not isinstance(backbone, FastCNN):
            raise ValueError(f"--whiten: expected --backbone fast_cnn, got {options.backbone}.")
        train = data.analysis_dataset("train")
        assert isinstance(train, LabeledImages)
        backbone.whiten(train.transform(train.images[torch.arange(min(_WHITENING_IMAGES, len(train)))]))
    features = int(cast("int", backbone.num_features))
    # as in the paper, 512 units for 512 features; below 128, eight experts of equal total would have a few units each
    dense = Dense(features, data.num_classes, width=options.head_width or max(128, features))
    return MoEClassifier(
        backbone,
        _matched(options, head, dense),
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        schedule=options.schedule,
        label_smoothing=options.label_smoothing,
        channels_last=options.channels_last,
    )


def _matched(options: Options, head: str, dense: Dense) -> Head:
    sizes = (dense.in_features, dense.num_classes)
    matched: dict[str, Any] = {"total": capacity(dense).total, "tolerance": 0.05}
    if head in ("sparse", "hard"):
        # the claims of the paper are about its gate
        matched |= NOISY_TOP_K
        if options.load_loss == "importance":
            matched["balance"] = {"importance": 0.4, "load": 0.0}
    match head:
        case "dense":
            return dense
        case "soft":
            return match_capacity("soft", *sizes, **matched)
        case "sparse":
            return match_capacity("sparse", *sizes, **matched)
        case "hard":
            return match_capacity("sparse", *sizes, **matched, k=1)
    raise AssertionError(head)
