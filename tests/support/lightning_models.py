"""Small LightningModules and data for the callbacks' tests."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from moe_heads import NOISY_TOP_K, SparseMoE

NUM_CLASSES, NUM_FEATURES = 3, 5


def loader(num_samples: int = 40, batch_size: int = 16, seed: int = 0, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, NUM_FEATURES, generator=generator)
    y = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size, shuffle=shuffle)


class PlainModule(LightningModule):
    """A user's module: a batch norm, a dropout and our sparse head; its loss comes from training_step only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = SparseMoE(8, NUM_CLASSES, num_experts=4, expert_width=4, **(NOISY_TOP_K | {"balance": None}))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(shuffle=True)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


def snapshot(module: LightningModule) -> dict[str, Any]:
    """Everything that an analysis must leave as it was."""
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "training": {name: child.training for name, child in module.named_modules()},
        "torch_rng": torch.get_rng_state(),
        "hooks": {name: len(child._forward_hooks) for name, child in module.named_modules()},
        "attributes": sorted(vars(module)),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after
