import pytest
import torch
from torch import nn

from moe_heads.lightning_modules import (
    CifarResNet,
    DigitsCNN,
    ResNet18Cifar,
    TimmBackbone,
    TorchvisionBackbone,
    build_backbone,
)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (DigitsCNN(), (1, 8, 8)),
        (DigitsCNN(in_channels=3, width=5), (3, 13, 10)),
        (CifarResNet(8), (3, 32, 32)),
        (CifarResNet(14, width=3, in_channels=1), (1, 9, 9)),
        (ResNet18Cifar(), (3, 32, 32)),
    ],
)
def test_features_have_the_stated_size(backbone: nn.Module, shape: tuple[int, ...]) -> None:
    features = backbone(torch.randn(2, *shape))
    assert features.shape == (2, backbone.num_features)
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_resnet18_has_the_size_and_resolution_of_the_study() -> None:
    backbone = ResNet18Cifar()
    # torchvision's 11,689,512 less fc (513,000) less the 7x7 stem (9,408) plus the 3x3 stem (1,728)
    assert num_parameters(backbone) == 11_689_512 - 513_000 - 9_408 + 1_728
    first_stage = backbone.resnet.layer1
    sizes: list[torch.Size] = []
    first_stage.register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    backbone(torch.randn(2, 3, 32, 32))
    assert sizes == [(2, 64, 32, 32)]


@pytest.mark.parametrize("depth", [8, 20, 32])
def test_cifar_resnet_has_the_closed_form_size(depth: int) -> None:
    n, w = (depth - 2) // 6, 16
    convs = [(3, w)] + [(w, w)] * 2 * n + [(w, 2 * w)] + [(2 * w, 2 * w)] * (2 * n - 1)
    convs += [(2 * w, 4 * w)] + [(4 * w, 4 * w)] * (2 * n - 1)
    assert len(convs) == depth - 1
    assert num_parameters(CifarResNet(depth)) == sum(9 * i * o + 2 * o for i, o in convs)


def test_cifar_resnet_20_with_a_linear_classifier_has_the_size_known_from_the_literature() -> None:
    assert num_parameters(CifarResNet(20)) + 64 * 10 + 10 == 269_722


def test_shortcut_carries_the_input_where_the_residual_is_silent() -> None:
    backbone = CifarResNet(8, width=4).eval()
    block = backbone.layers[4]  # the first of the second stage: stride 2, 4 -> 8 channels
    for parameter in block.residual.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(1, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].count_nonzero() == y[:, 6:].count_nonzero() == 0


@pytest.mark.parametrize("depth", [2, 7, 9, 18])
def test_cifar_resnet_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth: expected 6n \+ 2 .*, got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize("make", [DigitsCNN, CifarResNet, ResNet18Cifar])
def test_backbones_refuse_no_channels(make: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="in_channels: expected an integer of at least 1, got 0"):
        make(in_channels=0)


@pytest.mark.parametrize(
    ("name", "kind", "num_features"),
    [
        ("digits_cnn", DigitsCNN, 64),
        ("resnet8", CifarResNet, 64),
        ("resnet20", CifarResNet, 64),
        ("resnet18", ResNet18Cifar, 512),
        ("torchvision:shufflenet_v2_x0_5", TorchvisionBackbone, 1024),
        ("timm:resnet10t", TimmBackbone, 512),
    ],
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_build_backbone(name: str, kind: type[nn.Module], num_features: int, in_channels: int) -> None:
    backbone = build_backbone(name, in_channels, image_size=32)
    assert type(backbone) is kind
    assert backbone.num_features == num_features
    assert backbone(torch.randn(2, in_channels, 32, 32)).shape == (2, num_features)


def test_resnet8_and_resnet20_differ_in_depth() -> None:
    assert num_parameters(build_backbone("resnet8", 3, 32)) == num_parameters(CifarResNet(8))
    assert num_parameters(build_backbone("resnet20", 3, 32)) == num_parameters(CifarResNet(20))


@pytest.mark.parametrize("name", ["resnet", "timm:", "torchvision:", "keras:resnet", ""])
def test_build_backbone_lists_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected one of digits_cnn, fast_cnn, resnet8, .*timm:<name>, got {name!r}"):
        build_backbone(name, 3, 32)


def test_build_backbone_refuses_bad_sizes() -> None:
    with pytest.raises(ValueError, match="image_size: expected an integer of at least 1, got 0"):
        build_backbone("resnet8", 3, 0)
