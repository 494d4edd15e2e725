"""The protocols that the study knows, as whole sets of options."""

from dataclasses import dataclass
from typing import Literal

from moe_heads.analysis.sharpness.result import Engine
from moe_heads.lightning_modules import CropBorder, Schedule

HEADS = ("dense", "soft", "sparse", "hard")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a classifier is trained and analyzed; the defaults are those of arXiv 2601.15021.

    Attributes:
        data: "digits", "cifar10" or "imagefolder:PATH".
        backbone: A name that `build_backbone` knows.
        heads: Heads to compare.
        seeds: Number of seeds.
        epochs: Epochs of training.
        batch_size: Images a step.
        learning_rate: Largest learning rate.
        schedule: Of the learning rate.
        nesterov: Use Nesterov's momentum.
        weight_decay: L2 coefficient.
        label_smoothing: Of the training loss.
        augment: Random crops and flips of the training images.
        crop_padding: Pixels by which a crop may move each way.
        crop_border: What a crop sees beyond the image: "black", or the image mirrored ("reflect").
        precision: Of the training, as Lightning names it, or "auto": bf16 where the device has it, else fp32. Analyses
            compute in fp32.
        channels_last: Memory format of backbone and images.
        whiten: Whiten the first layer of a backbone that can (fast_cnn).
        load_loss: Balance of the sparse heads: "shazeer", importance and the smooth load; "importance", the importance
            twice, as the published code has it.
        engine: Of the sharpness: "lanczos", or "pyhessian" with that package's own stopping rule.
        analysis_samples: Samples of each split that curvature and landscape are computed on.
        plane_points: Points a side of the plane.
        threads: Threads of torch on the CPU; None for torch's choice.
    """

    data: str = "cifar10"
    backbone: str = "resnet18"
    heads: tuple[str, ...] = HEADS
    seeds: int = 3
    epochs: int = 50
    batch_size: int = 128
    learning_rate: float = 0.1
    schedule: Schedule = "cosine"
    nesterov: bool = False
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    augment: bool = True
    crop_padding: int = 4
    crop_border: CropBorder = "black"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "32-true"
    channels_last: bool = False
    whiten: bool = False
    load_loss: Literal["shazeer", "importance"] = "shazeer"
    engine: Engine = "lanczos"
    analysis_samples: int = 1000
    plane_points: int = 15
    threads: int | None = None


# Digits: minutes on two cores. Fewer samples, and one thread, because tensors of 8x8 images gain little from a second
# one and lose much where another program wants the core.
PRESETS = {
    "digits": Protocol(
        data="digits",
        backbone="digits_cnn",
        heads=HEADS[:3],
        seeds=2,
        epochs=15,
        batch_size=64,
        analysis_samples=250,
        plane_points=11,
        threads=1,
    ),
    "folder": Protocol(data="imagefolder", backbone="resnet8", heads=HEADS[:3], seeds=2, epochs=15),
    "paper": Protocol(),
    # Of the defects of the published code, those that change what is measured: no augmentation, a load loss that is
    # the importance loss, and eigenvalues by a power iteration that stops before it has converged.
    "paper-as-published": Protocol(augment=False, load_loss="importance", engine="pyhessian"),
    # Two CPU cores: a narrow network for more epochs, nearly all of its arithmetic in convolutions.
    # What each choice is worth: docs/results.md, by benchmarks/fast_cnn.py.
    "cpu": Protocol(
        backbone="fast_cnn",
        seeds=5,
        epochs=9,
        batch_size=256,
        learning_rate=0.25,
        schedule="linear",
        nesterov=True,
        label_smoothing=0.1,
        crop_padding=2,
        crop_border="reflect",
        precision="auto",
        channels_last=True,
        whiten=True,
        plane_points=11,
    ),
    # One large GPU: the paper's network with the same means.
    "gpu": Protocol(
        batch_size=512,
        learning_rate=0.4,
        schedule="linear",
        nesterov=True,
        label_smoothing=0.1,
        crop_border="reflect",
        precision="auto",
        channels_last=True,
    ),
}

# the preset of a kind of data, where none is named
PRESET_OF = {"digits": "digits", "cifar10": "paper", "imagefolder": "folder"}
