import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads.lightning_modules import FeatureExtractor, TimmBackbone, TorchvisionBackbone


def test_pooled_maps_are_flattened() -> None:
    backbone = FeatureExtractor(nn.AdaptiveAvgPool2d(1), num_features=3)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(backbone(x), x.mean((2, 3), keepdim=True).flatten(1))


@pytest.mark.parametrize("num_features", [2, 4])
def test_wrong_feature_size_is_refused(num_features: int) -> None:
    backbone = FeatureExtractor(nn.Flatten(), num_features)
    with pytest.raises(ValueError, match=rf"Flatten: expected .* = \(5, {num_features}\), got \(5, 3\)"):
        backbone(torch.zeros(5, 3))


def test_unpooled_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Identity: expected .* = \(2, 3\), got \(2, 3, 4, 4\)"):
        FeatureExtractor(nn.Identity(), 3)(torch.zeros(2, 3, 4, 4))


def test_output_that_is_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ValueError, match=r"Pair: expected .* = \(2, 3\), got tuple"):
        FeatureExtractor(Pair(), 3)(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("name", "size", "num_features"),
    [("mobilenet_v3_small", 32, 1024), ("densenet121", 32, 1024), ("vgg11", 32, 4096), ("vit_b_32", 64, 768)],
)
def test_torchvision_features_are_the_input_of_the_last_layer(name: str, size: int, num_features: int) -> None:
    with torch.device("meta"):
        backbone = TorchvisionBackbone(name, image_size=size)
        assert backbone.training
        assert backbone.num_features == num_features
        assert backbone(torch.zeros(2, 3, size, size)).shape == (2, num_features)


def test_torchvision_backbone_plus_its_classifier_is_the_model() -> None:
    backbone = TorchvisionBackbone("resnet18", image_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    features = backbone(x)
    classifier = nn.Linear(512, 7)
    backbone.module.fc = classifier
    torch.testing.assert_close(backbone.module(x), classifier(features))


def test_grey_images_are_repeated() -> None:
    backbone = TorchvisionBackbone("resnet18", in_channels=1, image_size=32).eval()
    gray = torch.randn(2, 1, 32, 32)
    assert torch.equal(backbone(gray), backbone.module(gray.repeat(1, 3, 1, 1)))


def test_googlenet_has_one_output_in_training() -> None:
    backbone = TorchvisionBackbone("googlenet", image_size=32)
    assert backbone.training
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "torchvision model: expected one of 'alexnet', .*, got 'resnet19'"),
        ({"name": "resnet18", "in_channels": 4}, "in_channels: expected 3 or 1 for a torchvision model, got 4"),
        ({"name": "resnet18", "image_size": 0}, "image_size: expected an integer of at least 1, got 0"),
        ({"name": "squeezenet1_1"}, "squeezenet1_1: expected a linear classifier at the end, got AdaptiveAvgPool2d"),
        ({"name": "alexnet", "image_size": 8}, r"torchvision:alexnet does not support images of shape \(3, 8, 8\): "),
        ({"name": "resnet18", "weights": "NONE_SUCH"}, "torchvision:resnet18, weights='NONE_SUCH', image_size=224: "),
    ],
)
def test_torchvision_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchvisionBackbone(**arguments)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet10t", 32), ("mobilenetv3_small_050", 32), ("vit_tiny_patch16_224", 48)]
)
def test_timm_features(name: str, size: int) -> None:
    backbone = TimmBackbone(name, in_channels=1, image_size=size)
    assert backbone(torch.randn(2, 1, size, size)).shape == (2, backbone.num_features)


def test_timm_refuses_an_unknown_name_and_names_similar_ones() -> None:
    with pytest.raises(ValueError, match=r"timm model: .*, got 'resnet10x'\. Similar names: resnet10t, "):
        TimmBackbone("resnet10x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg11", r"timm:vgg11 does not support images of shape \(3, 8, 8\): "),
        ("xcit_nano_12_p16_224", "timm:xcit_nano_12_p16_224 does not support image_size=8: "),
    ],
)
def test_timm_refuses_images_that_are_too_small(name: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        TimmBackbone(name, image_size=8)


def test_without_timm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(
        ImportError, match=r"backbone timm:resnet18: timm is not installed. Run `pip install moe-heads\[timm\]`"
    ):
        TimmBackbone("resnet18")
