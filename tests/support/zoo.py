"""The zoo: modules as people bring them, with their data and what each analysis is expected to make of them."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel, Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer, mobilenet_v3_small, resnet18, shufflenet_v2_x0_5
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from moe_heads import SparseMoE
from tests.support.zoo_modules import (
    GAN,
    NUM_CLASSES,
    LanguageClassifier,
    Measured,
    OfflineLSTM,
    OfflineTransformer,
    OfPairs,
    Pair,
    Recurrent,
    Stream,
    VariationalAutoencoder,
    Wrapped,
)
from tests.support.zoo_table import Entry, ExpectedWarning, Loader

NUM_SAMPLES, BATCH_SIZE = 16, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(NUM_SAMPLES, *shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, (NUM_SAMPLES, *shape), generator=torch.Generator().manual_seed(seed))


def given(*tensors: Tensor) -> Loader:
    return lambda: DataLoader(TensorDataset(*tensors), BATCH_SIZE)


def classified(*shape: int, seed: int = 0) -> Loader:
    return given(normal(*shape, seed=seed), integers(NUM_CLASSES, seed=seed))


def unlabeled(*shape: int) -> Loader:
    # a batch is one tensor
    return lambda: DataLoader(normal(*shape), BATCH_SIZE)


def sentences() -> DataLoader[Any]:
    padding = torch.arange(6) < integers(6, 1) + 1
    entries = {"input_ids": integers(20, 6), "attention_mask": padding.long(), "labels": integers(NUM_CLASSES)}
    samples = [{name: values[index] for name, values in entries.items()} for index in range(NUM_SAMPLES)]
    return DataLoader(samples, BATCH_SIZE)


def pairs() -> DataLoader[Any]:
    def collate(samples: list[tuple[Tensor, Tensor]]) -> Pair:
        return Pair(*map(torch.stack, zip(*samples, strict=True)))

    return DataLoader(TensorDataset(normal(5), integers(NUM_CLASSES)), BATCH_SIZE, collate_fn=collate)


def normalized_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, NUM_CLASSES))


def of_measured(name: str, title: str, **options: Any) -> Entry:
    title = f"Batch norm, dropout, metric; {title}"
    return Entry(name, title, lambda: Measured(normalized_mlp()), classified(5), **options)


def of_pixels(output: dict[str, Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(output["out"], labels)


def sparse_shufflenet() -> LightningModule:
    """Fine-tuning: frozen features, our sparse head."""
    net = shufflenet_v2_x0_5().requires_grad_(False)
    net.fc = SparseMoE(1024, NUM_CLASSES, num_experts=4, expert_width=8, balance=None)
    return Wrapped(net)


def timm_module(name: str, **options: Any) -> Callable[[], LightningModule]:
    return lambda: Wrapped(timm.create_model(name, num_classes=NUM_CLASSES, **options))


def small_vit() -> LightningModule:
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return Wrapped(VisionTransformer(image_size=16, patch_size=8, num_classes=NUM_CLASSES, **sizes))


def small_resnet() -> LightningModule:
    return Wrapped(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=NUM_CLASSES))


def resnet_deeplab() -> LightningModule:
    backbone = IntermediateLayerGetter(resnet18(), {"layer1": "out"})
    return Wrapped(DeepLabV3(backbone, DeepLabHead(64, NUM_CLASSES, atrous_rates=(1, 2))), of_pixels)


def mobilenet_deeplab() -> LightningModule:
    # hardswish in place, and hardsigmoid in its squeeze-and-excitation blocks
    layers = nn.ModuleDict({"all": mobilenet_v3_small(width_mult=0.5).features[:6]})
    head = DeepLabHead(24, NUM_CLASSES, atrous_rates=(1, 2))
    return Wrapped(DeepLabV3(IntermediateLayerGetter(layers, {"all": "out"}), head), of_pixels)


TOKENS = given(integers(20, 6), integers(20, 6, seed=1))
SEGMENTED = given(normal(3, 16, 16), integers(NUM_CLASSES, 16, 16))
CARRIES_A_STATE = ExpectedWarning(
    r"the loss of one batch was .* on a repeat .* The module carries a state between batches",
    "the module carries a state from batch to batch",
)
IS_A_SUM = ExpectedWarning(
    r"the loss of \d+ samples is the sum of the losses of its halves", "the loss is a sum over the samples"
)
OF_THE_LOSS = ("sharpness", "loss_landscape")

ZOO = [
    Entry("boring", "Lightning `BoringModel`", BoringModel, unlabeled(32), unlabeled(32)),
    Entry(
        "manual",
        "Lightning `ManualOptimBoringModel`, `loss_fn`",
        ManualOptimBoringModel,
        unlabeled(32),
        loss_fn=lambda module, batch: module.step(batch),
    ),
    Entry("iterable", "`BoringModel`, iterable data set", BoringModel, lambda: DataLoader(Stream(normal(32)), 8)),
    Entry(
        "demo",
        "Lightning `DemoModel`",
        DemoModel,
        unlabeled(32),
        warned=dict.fromkeys(OF_THE_LOSS, IS_A_SUM),
    ),
    Entry(
        "lightning_transformer",
        "Lightning `LightningTransformer`",
        lambda: OfflineTransformer(vocab_size=20),
        TOKENS,
        forward_fn=lambda module, batch: module(*batch),
    ),
    Entry(
        "lightning_lstm",
        "Lightning `LightningLSTM`",
        OfflineLSTM,
        TOKENS,
        forward_fn=OfflineLSTM.from_rest,
        warned=dict.fromkeys(OF_THE_LOSS, CARRIES_A_STATE),
    ),
    Entry(
        "lightning_lstm_from_rest",
        "Lightning `LightningLSTM`, `loss_fn` that resets its state",
        OfflineLSTM,
        TOKENS,
        loss_fn=OfflineLSTM.loss_from_rest,
        forward_fn=OfflineLSTM.from_rest,
    ),
    Entry("lightning_net", "Lightning's demo ConvNet `Net`", lambda: Wrapped(Net(), F.nll_loss), classified(1, 28, 28)),
    Entry("resnet", "torchvision `ResNet` of basic blocks, 4.9 M parameters", small_resnet, classified(3, 16, 16)),
    Entry("vit", "torchvision `VisionTransformer`", small_vit, classified(3, 16, 16), classified(3, 16, 16, seed=1)),
    Entry(
        "deeplab_mobilenet",
        "torchvision `DeepLabV3` on a narrow `mobilenet_v3_small` (hardsigmoid, hardswish)",
        mobilenet_deeplab,
        SEGMENTED,
    ),
    Entry("deeplab_resnet", "torchvision `DeepLabV3` on ResNet", resnet_deeplab, SEGMENTED),
    Entry(
        "timm_convnext",
        "timm `convnext_atto`, narrow",
        timm_module("convnext_atto", dims=(8, 16, 32, 64), depths=(1, 1, 2, 1)),
        classified(3, 32, 32),
    ),
    Entry(
        "timm_vit",
        "timm `vit_tiny_patch16_224`",
        timm_module("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2),
        classified(3, 16, 16),
    ),
    Entry(
        "gan",
        "GAN, spectral norm, manual optimization, `loss_fn`",
        GAN,
        classified(5),
        loss_fn=lambda module, batch: module.generator_loss(batch),
        forward_fn=lambda module, batch: module(torch.randn(len(batch[0]), 3)),
    ),
    Entry(
        "autoencoder",
        "Autoencoder",
        lambda: Wrapped(nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 5)), F.mse_loss),
        given(normal(5), normal(5)),
    ),
    Entry("vae", "Variational autoencoder (random loss)", VariationalAutoencoder, classified(5)),
    of_measured(
        "ema",
        "`EMAWeightAveraging`",
        val=classified(5, seed=1),
        callbacks=lambda: [EMAWeightAveraging(decay=0.9)],
        plane=True,
    ),
    of_measured("averaged", "`WeightAveraging`", callbacks=lambda: [WeightAveraging()]),
    of_measured(
        "swa",
        "`StochasticWeightAveraging`",
        trainer={"max_epochs": 2},
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    ),
    of_measured("bfloat16", "bf16-mixed", trainer={"precision": "bf16-mixed"}),
    of_measured("float64", "64-true", trainer={"precision": "64-true"}),
    Entry("gru", "GRU classifier", lambda: Wrapped(Recurrent()), classified(7, 5), classified(7, 5, seed=1)),
    Entry("hugging_face", "transformers `BertForSequenceClassification`", LanguageClassifier, sentences),
    Entry(
        "dataclass",
        "Batch is a dataclass",
        lambda: OfPairs(normalized_mlp()),
        pairs,
        forward_fn=lambda module, batch: module(batch.x),
    ),
    Entry(
        "sparse_moe",
        "torchvision `shufflenet_v2_x0_5`, frozen, with `SparseMoE`",
        sparse_shufflenet,
        classified(3, 16, 16),
        has_experts=True,
    ),
]
