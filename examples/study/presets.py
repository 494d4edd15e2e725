"""Protocols of the study as complete sets of options."""

from dataclasses import dataclass
from typing import Literal

from moe_heads.analysis.sharpness.result import Engine
from moe_heads.lightning_modules import CropBorder, Schedule

HEADS = ("dense", "soft", "sparse", "hard")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Training and analysis options of a classifier; the defaults are those of arXiv 2601.15021.

    Attributes:
        data: "digits", "cifar10" or "imagefolder:PATH".
        backbone: Name of a backbone; see `build_backbone`.
        heads: Heads to compare.
        seeds: Number of seeds.
        epochs: Epochs of training.
        batch_size: Images in a training step.
        learning_rate: Largest learning rate.
        schedule: Schedule of the learning rate.
        nesterov: Whether to use Nesterov's momentum.
        weight_decay: L2 coefficient.
        label_smoothing: Label smoothing of the training loss.
        augment: Whether to crop and flip the training images at random.
        crop_padding: Largest shift of a crop in pixels.
        crop_border: Padding of a crop beyond the image: "black", or the mirrored image ("reflect").
        precision: Lightning's precision of training, or "auto": bf16 if the device supports it, else fp32. Analyses
            compute in fp32.
        channels_last: Whether backbone and images use the channels-last memory format.
        whiten: Whether to whiten the first layer of the backbone (fast_cnn only).
        load_loss: Balance loss of the sparse heads: "shazeer", importance and the smooth load; "importance", the
            importance twice, as in the published code.
        engine: Engine of the sharpness: "lanczos", or "pyhessian" with that package's own stopping rule.
        analysis_samples: Samples of each split for curvature and landscape.
        plane_points: Points on each side of the plane.
        threads: Threads of torch on the CPU; None for torch's default.
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
# thread and lose much if another program uses the core.
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
    # The defects of the published code that change the results: no augmentation, a load loss equal to the importance
    # loss, and eigenvalues from a power iteration that stops before convergence.
    "paper-as-published": Protocol(augment=False, load_loss="importance", engine="pyhessian"),
    # Two CPU cores: a narrow network for more epochs, with nearly all arithmetic in convolutions. docs/results.md has
    # the effect of each choice, measured by benchmarks/fast_cnn.py.
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
    # One large GPU: the paper's network with the same techniques.
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

# the default preset of each kind of data
PRESET_OF = {"digits": "digits", "cifar10": "paper", "imagefolder": "folder"}
