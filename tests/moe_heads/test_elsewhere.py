"""Heads inside third-party models and training setups."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_heads import Dense, Head, SoftMoE, SparseMoE, collect_routing
from tests.support.head_zoo import FEATURES, ROUTERS, head_with
from tests.support.processes import run_on_ranks

HEADS = (Dense, SoftMoE, SparseMoE)


def torchvision_resnet(kind: type[Head]) -> nn.Module:
    model = torchvision.models.resnet18(num_classes=10)
    model.fc = kind(model.fc.in_features, 10)
    return model


def torchvision_vit(kind: type[Head]) -> nn.Module:
    model = torchvision.models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    model.heads.head = kind(16, 10)
    return model


def timm_resnet(kind: type[Head]) -> nn.Module:
    model = timm.create_model("resnet10t", num_classes=0)
    return nn.Sequential(model, kind(model.num_features, 10))


def timm_vit(kind: type[Head]) -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, depth=1, embed_dim=24, num_heads=2, num_classes=10
    )
    model.head = kind(model.head.in_features, 10)
    return model


def transformers_vit(kind: type[Head]) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.ViTForImageClassification(config)
    model.classifier = kind(config.hidden_size, 10)
    return model


def transformers_resnet(kind: type[Head]) -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    model.classifier = nn.Sequential(nn.Flatten(), kind(16, 10))
    return model


MODELS: tuple[Callable[[type[Head]], nn.Module], ...] = (
    torchvision_resnet,
    torchvision_vit,
    timm_resnet,
    timm_vit,
    transformers_vit,
    transformers_resnet,
)


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_stands_where_the_classifier_stood(build: Callable[[type[Head]], nn.Module], kind: type[Head]) -> None:
    model = build(kind)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    with collect_routing(model) as routing:
        output = model(images)
    logits = output if torch.is_tensor(output) else output.logits
    (F.cross_entropy(logits, labels) + routing.aux_loss).backward()
    assert logits.shape == (4, 10)
    assert len(routing.stats) == (0 if kind is Dense else 1)
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert all("pooler" in name or "mask_token" in name for name in missing)


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(router: str, use_reentrant: bool) -> None:
    head = head_with(router, dropout=0.5).train()
    x = torch.randn(12, FEATURES).double().requires_grad_()
    gradients = []
    for run in (head, lambda x: checkpoint(head, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        head.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in head.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def train_on(rank: int | None) -> dict[str, torch.Tensor]:
    """A step in which the first expert takes every row, on half of the batch or on all of it."""
    torch.manual_seed(0)
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, k=1, noisy=False, dropout=0.0, balance={"importance": 0.1})
    with torch.no_grad():
        head.router.gate.bias[0] = 50.0
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    model: nn.Module = head
    if rank is not None:
        # every parameter has to have a gradient: find_unused_parameters stays off
        model = nn.parallel.DistributedDataParallel(head)
        x, y = x[6 * rank : 6 * rank + 6], y[6 * rank : 6 * rank + 6]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(x, return_routing=True)
        (F.cross_entropy(output.logits, y) + output.aux_loss).backward()
        optimizer.step()
    return dict(head.named_parameters())


def test_data_parallel_training_with_experts_that_see_no_sample(tmp_path: Path) -> None:
    expected = train_on(None)
    for parameters in run_on_ranks(train_on, tmp_path):
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name])


@pytest.mark.parametrize("kind", HEADS)
def test_a_plain_linear_layers_features_may_be_strided(kind: type[Head]) -> None:
    head = kind(6, 3).eval()
    x = torch.randn(6, 5).t()
    torch.testing.assert_close(head(x), head(x.contiguous()))
