"""Feature extractors that make a backbone from any module, a torchvision model or a timm model.

Shapes: B batch, C channels, F features.
"""

import difflib
import importlib
import math

import torch
import torchvision
from torch import Tensor, nn

from moe_heads.checks import check_at_least_one, check_option

__all__ = ["FeatureExtractor", "TimmBackbone", "TorchvisionBackbone"]


class FeatureExtractor(nn.Module):
    """Backbone from an arbitrary module, whose output is flattened to (B, F).

    Args:
        module: Module whose output for a batch is (B, F), or (B, F, 1, 1).
        num_features: F.

    Attributes:
        num_features: F.

    Raises:
        ValueError: If ``num_features`` is below 1. In a call, if the output has a different size.

    Example:
        >>> import torch
        >>> backbone = FeatureExtractor(torch.nn.AdaptiveAvgPool2d(1), num_features=3)
        >>> backbone(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(self, module: nn.Module, num_features: int) -> None:
        super().__init__()
        check_at_least_one(num_features=num_features)
        self.module = module
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features (B, F)."""
        output = self.module(x)
        expected = (x.shape[0], self.num_features)
        if not isinstance(output, Tensor) or output.shape[:2] != expected or math.prod(output.shape[2:]) != 1:
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{type(self.module).__name__}: expected an output of shape (B, num_features) = {expected}, got {came}."
                " Pass the matching num_features, or pool the output."
            )
        return output.flatten(1)


class TorchvisionBackbone(FeatureExtractor):
    """Classification model of torchvision without its last linear layer.

    Args:
        name: One of `torchvision.models.list_models(module=torchvision.models)`, such as "mobilenet_v3_small".
        in_channels: C, 3 or 1. The stems have three channels, so gray images are repeated.
        image_size: Side of the images in pixels. A vision transformer is built for it.
        weights: Name of pretrained weights such as "DEFAULT". None starts from random weights.

    Attributes:
        num_features: F, the input size of the removed layer.

    Raises:
        ValueError: If there is no model of that name, its last layer is not linear, or it does not support such images.

    Example:
        >>> TorchvisionBackbone("resnet18", image_size=64).num_features
        512
    """

    def __init__(self, name: str, in_channels: int = 3, image_size: int = 224, weights: str | None = None) -> None:
        check_at_least_one(image_size=image_size)
        if in_channels not in {1, 3}:
            raise ValueError(f"in_channels: expected 3 or 1 for a torchvision model, got {in_channels!r}.")
        known = torchvision.models.list_models(module=torchvision.models)
        check_option("torchvision model", name, known)
        options: dict[str, int | bool] = {}
        if name.startswith("vit_"):
            options["image_size"] = image_size
        elif name in {"googlenet", "inception_v3"}:
            options["init_weights"] = False  # the custom initialization of these models takes minutes
        try:
            model = torchvision.models.get_model(name, weights=weights, **options)
        except (KeyError, ValueError) as error:
            raise ValueError(f"torchvision:{name}, weights={weights!r}, image_size={image_size}: {error}") from error
        _drop_auxiliary_classifiers(model)
        super().__init__(model, _drop_last_linear(model, f"torchvision:{name}"))
        self.is_gray = in_channels == 1
        _check_takes(self, f"torchvision:{name}", in_channels, image_size)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features (B, F) of images (B, C, image_size, image_size)."""
        return super().forward(x.expand(-1, 3, -1, -1) if self.is_gray else x)


class TimmBackbone(FeatureExtractor):
    """Model of timm without its classifier (``num_classes=0``). Needs ``pip install moe-heads[timm]``.

    Args:
        name: One of `timm.list_models()`.
        in_channels: C.
        image_size: Side of the images in pixels. A model of fixed input size is built for it.
        pretrained: Whether to load the pretrained weights of timm.

    Attributes:
        num_features: F.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If there is no model of that name, or it does not support such images.

    Example:
        >>> TimmBackbone("resnet10t", in_channels=1, image_size=32).num_features
        512
    """

    def __init__(self, name: str, in_channels: int = 3, image_size: int = 224, pretrained: bool = False) -> None:
        check_at_least_one(in_channels=in_channels, image_size=image_size)
        try:
            timm = importlib.import_module("timm")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"backbone timm:{name}: timm is not installed. Run `pip install moe-heads[timm]`."
            ) from error
        if not timm.is_model(name):
            similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5)) or "none"
            raise ValueError(f"timm model: expected one of timm.list_models(), got {name!r}. Similar names: {similar}.")
        settings = timm.get_pretrained_cfg(name)
        options = {"img_size": image_size} if settings is not None and settings.fixed_input_size else {}
        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_channels, **options)
        except (ArithmeticError, AssertionError) as error:
            raise ValueError(f"timm:{name} does not support image_size={image_size}: {error}") from error
        # models with a hidden layer in the classifier have more output features than `num_features`
        super().__init__(model, getattr(model, "head_hidden_size", None) or model.num_features)
        _check_takes(self, f"timm:{name}", in_channels, image_size)


def _drop_auxiliary_classifiers(model: nn.Module) -> None:
    """Remove the auxiliary classifiers, with which GoogLeNet and Inception return several outputs in training."""
    if hasattr(model, "aux_logits"):
        model.aux_logits = False  # type: ignore[assignment]
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, name):
                setattr(model, name, None)


def _drop_last_linear(model: nn.Module, name: str) -> int:
    """Replace the last leaf, which must be linear, by the identity, and return its input size."""
    path, last = [(path, module) for path, module in model.named_modules() if not list(module.children())][-1]
    if not isinstance(last, nn.Linear):
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"{name}: expected a linear classifier at the end, got {type(last).__name__} at {path!r} (linear layers:"
            f" {linear or 'none'}). Wrap the part you need in FeatureExtractor."
        )
    model.set_submodule(path, nn.Identity())
    return last.in_features


def _check_takes(backbone: FeatureExtractor, name: str, in_channels: int, image_size: int) -> None:
    """Run one forward pass, so that too small images fail here and not in the first training step."""
    shape = (1, in_channels, image_size, image_size)
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            backbone(torch.zeros(shape))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{name} does not support images of shape {shape[1:]}: {error}") from error
    finally:
        backbone.train(training)
