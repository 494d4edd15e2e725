"""Residual networks with a head, briefly trained on real images, for the benchmarks.

Shapes: N images, H and W pixels.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import NOISY_TOP_K, SparseMoE, capacity, match_capacity
from moe_heads.lightning_modules import CifarResNet, ImageFiles, ImageTransform, ResNet18Cifar
from moe_heads.lightning_modules.cifar10 import CIFAR10_MEAN, CIFAR10_STD

__all__ = ["HEADS", "NETS", "Images", "Net", "load_images", "trained"]

HEADS = ("dense", "soft", "sparse")


@dataclass(frozen=True)
class Net:
    """A backbone with benchmark options that depend on its size.

    Attributes:
        backbone: Builds the untrained backbone.
        batch: Images in a batch of the measurements.
        steps: Training steps.
        rounds: Number of full measurements of each candidate.
    """

    backbone: Callable[[], CifarResNet | ResNet18Cifar]
    batch: int
    steps: int
    rounds: int


NETS = {"resnet8": Net(partial(CifarResNet, 8), 128, 800, 3), "resnet18": Net(ResNet18Cifar, 32, 150, 1)}


@dataclass(frozen=True)
class Images:
    """Raw images (N, 3, H, W), uint8, with labels (N,), int64."""

    raw: Tensor
    labels: Tensor
    num_classes: int

    def chosen(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return images with random crops and flips, and their labels."""
        return ImageTransform(CIFAR10_MEAN, CIFAR10_STD, padding=4, flip=True)(self.raw[places]), self.labels[places]

    def batches(self, num_samples: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return the first images without augmentation, in batches."""
        x = ImageTransform(CIFAR10_MEAN, CIFAR10_STD)(self.raw[:num_samples])
        return list(zip(x.split(size), self.labels[:num_samples].split(size), strict=True))


def load_images(folder: Path, limit: int, seed: int) -> Images:
    """Load at most ``limit`` images of ``folder/train/<class>``, in an order fixed by the seed.

    Raises:
        ValueError: If there are no images.
    """
    classes = sorted(path for path in (folder / "train").glob("*") if path.is_dir())
    files = [(path, label) for label, name in enumerate(classes) for path in sorted(name.iterdir())]
    if not files:
        raise ValueError(f"--images: expected images in train/<class> folders, got none in {folder}.")
    chosen = random.Random(seed).sample(files, min(limit, len(files)))
    with Image.open(chosen[0][0]) as image:
        width, height = image.size
    raw = ImageFiles([path for path, _ in chosen], height, width)[torch.arange(len(chosen))]
    return Images(raw, torch.tensor([label for _, label in chosen]), len(classes))


def trained(
    net: str, head: str, images: Images, *, steps: int, seed: int, batch: int = 128, cache: Path | None = None
) -> nn.Module:
    """Return backbone and head, trained by SGD with momentum and a linear schedule to zero, in evaluation mode.

    The heads have equal total parameters. The projection of the sparse head's noise is unused in evaluation and is
    frozen, since most Hessian libraries raise an error for parameters that the loss does not depend on.

    Args:
        net: Key of `NETS`.
        head: One of `HEADS`.
        images: Training images, used with random crops and flips.
        steps: Training steps.
        seed: Seed of the weights and of the training.
        batch: Images in a training step.
        cache: File of trained weights, read before and written after the training.
    """
    torch.manual_seed(seed)
    backbone = NETS[net].backbone()
    model = nn.Sequential(backbone, _head(head, backbone.num_features, images.num_classes))
    key = f"{net}/{head} steps={steps} seed={seed} images={len(images.raw)} batch={batch}"
    weights: dict[str, dict[str, Tensor]] = torch.load(cache) if cache is not None and cache.exists() else {}
    if key in weights:
        model.load_state_dict(weights[key])
    else:
        _train(model, images, steps, batch)
        if cache is not None:
            torch.save(weights | {key: model.state_dict()}, cache)
    if isinstance(model[1], SparseMoE):
        noise = getattr(model[1].router, "noise", None)
        assert isinstance(noise, nn.Module)
        noise.requires_grad_(False)
    return model.eval()


def _head(kind: str, in_features: int, num_classes: int) -> nn.Module:
    sparse = SparseMoE(in_features, num_classes, **NOISY_TOP_K)
    if kind == "sparse":
        return sparse
    return match_capacity(kind, in_features, num_classes, total=capacity(sparse).total)  # type: ignore[arg-type]


def _train(model: nn.Module, images: Images, steps: int, batch: int) -> None:
    assert isinstance(model, nn.Sequential)
    backbone, head = model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(steps, 1))
    model.train()
    for _ in range(steps):
        x, y = images.chosen(torch.randint(len(images.raw), (batch,)))
        output = head(backbone(x), return_routing=True)
        loss = F.cross_entropy(output.logits, y) + output.aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
