from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_heads.lightning_modules import FastCNN, FeatureExtractor, MoEClassifier, build_backbone


def test_size_and_gradients() -> None:
    backbone = FastCNN(widths=(8, 12, 20))
    features = backbone(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 20) == (2, backbone.num_features)
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_least_size_of_an_image() -> None:
    assert FastCNN()(torch.zeros(2, 3, 9, 9)).shape == (2, 128)
    assert build_backbone("fast_cnn", 3, 9).num_features == 128
    with pytest.raises(ValueError, match="image_size: expected at least 9 for fast_cnn, got 8"):
        build_backbone("fast_cnn", 3, 8)


def test_default_has_the_size_that_its_documentation_says() -> None:
    assert sum(parameter.numel() for parameter in FastCNN().parameters()) == pytest.approx(0.49e6, rel=0.01)


def test_whitened_patches_are_uncorrelated_with_variance_one() -> None:
    torch.manual_seed(1)
    # neighbors that are alike, as in an image
    images = F.avg_pool2d(torch.randn(200, 3, 34, 34), 3, 1) + 0.3 * torch.randn(200, 1, 32, 32)
    backbone = FastCNN()
    backbone.whiten(images)
    responses = backbone.first(images).double().movedim(1, 0).flatten(1)
    half = len(responses) // 2
    torch.testing.assert_close(responses[:half], -responses[half:])
    moments = responses[:half] @ responses[:half].T / responses.shape[1]
    # λ/(λ + 5e-4), where the least variance is above 0.01
    torch.testing.assert_close(moments, torch.eye(half, dtype=torch.float64), atol=0.05, rtol=0)


def test_whitened_layer_stays_through_a_training_step() -> None:
    backbone = FastCNN(widths=(4,))
    backbone.whiten(torch.randn(20, 3, 8, 8))
    model = MoEClassifier(backbone, nn.Linear(4, 2), schedule="constant")
    before = backbone.first.weight.clone()
    optimizer = model.configure_optimizers()
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    assert torch.equal(backbone.first.weight, before)
    assert backbone.first.bias is not None and not backbone.first.bias.any()


def test_a_loaded_layer_is_as_fixed_as_the_saved_one() -> None:
    backbone, other = FastCNN(widths=(4,)), FastCNN(widths=(4,))
    other.load_state_dict(backbone.state_dict())
    assert other.first.weight.requires_grad
    backbone.whiten(torch.randn(20, 3, 8, 8))
    other.load_state_dict(backbone.state_dict())
    assert not other.first.weight.requires_grad and not other.first.bias.requires_grad


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 1, 8, 8), r"images: expected \(N, 3, H, W\), got shape \(4, 1, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"images: expected \(N, 3, H, W\), got shape \(0, 3, 8, 8\)"),
        (torch.zeros(4, 3, 1, 8), r"images: expected \(N, 3, H, W\), got shape \(4, 3, 1, 8\)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "images: expected finite floats, got .* Normalize"),
        (torch.full((4, 3, 8, 8), float("nan")), "images: expected finite floats, got .* Normalize"),
    ],
)
def test_bad_images_are_refused(images: torch.Tensor, message: str) -> None:
    backbone = FastCNN()
    before = backbone.first.weight.clone()
    with pytest.raises(ValueError, match=message):
        backbone.whiten(images)
    assert torch.equal(backbone.first.weight, before) and backbone.first.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, r"widths: expected a sequence with the channels of each stage, got \(\)"),
        ({"widths": 64}, "widths: expected a sequence with the channels of each stage, got 64"),
        ({"widths": (8, 0)}, r"widths\[1\]: expected an integer of at least 1, got 0"),
        ({"in_channels": 0}, "in_channels: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastCNN(**options)


def test_channels_last_changes_the_layout_and_no_value() -> None:
    backbone = FastCNN(widths=(8, 16)).double()
    plain = MoEClassifier(backbone, nn.Linear(16, 3).double(), schedule="constant").eval()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected = plain(images)
    model = MoEClassifier(backbone, plain.head, schedule="constant", channels_last=True).eval()
    assert backbone.layers[1].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_channels_last_leaves_features_that_are_no_images() -> None:
    model = MoEClassifier(FeatureExtractor(nn.Identity(), 6), nn.Linear(6, 3), channels_last=True)
    assert model(torch.zeros(2, 6)).shape == (2, 3)
