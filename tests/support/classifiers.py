"""A classifier small enough for a test, the data for it and a quiet Trainer."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moe_heads import NOISY_TOP_K, Dense, SoftMoE, SparseMoE
from moe_heads.lightning_modules import FeatureExtractor

NUM_FEATURES, NUM_CLASSES = 6, 3


def backbone() -> FeatureExtractor:
    return FeatureExtractor(nn.Identity(), NUM_FEATURES)


def sparse(**options: Any) -> SparseMoE:
    return SparseMoE(NUM_FEATURES, NUM_CLASSES, num_experts=4, expert_width=5, **(dict(NOISY_TOP_K) | options))


MAKE_HEAD: dict[str, Callable[[], nn.Module]] = {
    "Dense": lambda: Dense(NUM_FEATURES, NUM_CLASSES, width=7),
    "SoftMoE": lambda: SoftMoE(NUM_FEATURES, NUM_CLASSES, num_experts=4, expert_width=5),
    "SparseMoE": sparse,
    "Linear": lambda: nn.Linear(NUM_FEATURES, NUM_CLASSES),
}


def trainer(**options: Any) -> Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **(defaults | options))


def samples(num_samples: int = 24) -> TensorDataset:
    return TensorDataset(torch.randn(num_samples, NUM_FEATURES), torch.arange(num_samples) % NUM_CLASSES)


def loader(data: TensorDataset | None = None, batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(data or samples(), batch_size)
