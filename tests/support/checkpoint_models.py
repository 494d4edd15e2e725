"""Models and data of the tests of the command line, which imports them by name."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from moe_heads import SparseMoE


class Model(LightningModule):
    """Hidden layer and a sparse head, which load_from_checkpoint builds without arguments."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.head = SparseMoE(width, 3, num_experts=3, expert_width=4, num_shared_experts=1, normalize=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))

    def training_step(self, batch, batch_idx):
        x, labels = batch
        return F.cross_entropy(self(x), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def build(state: dict[str, Tensor]) -> Model:
    return Model()


def build_loaded(state: dict[str, Tensor]) -> nn.Module:
    """A module with other names than the checkpoint, which the function loads itself."""
    model = Model()
    model.load_state_dict(state)
    return nn.Sequential(model.first, nn.Tanh(), model.head)


def build_wide(state: dict[str, Tensor]) -> Model:
    return Model(7)


def build_steep(state: dict[str, Tensor]) -> nn.Module:
    """The same weights in another function."""
    model = Model()
    model.head.router.temperature = 5.0
    return model


def build_number(state: dict[str, Tensor]) -> int:
    return 3


def samples(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 5, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def data() -> dict[str, DataLoader]:
    return {"train": DataLoader(samples(0), batch_size=16, shuffle=True), "test": DataLoader(samples(1), batch_size=16)}


def one_loader() -> DataLoader:
    return DataLoader(samples(0), batch_size=16)


def unlabeled() -> list[Tensor]:
    return [torch.randn(4, 5)]


def wrong_splits() -> dict[str, list[Tensor]]:
    return {"training": []}


class Data(LightningDataModule):
    """Noisy training data, with the clean data set for analyses."""

    def analysis_dataset(self, split: str) -> TensorDataset:
        return samples({"train": 0, "test": 1}[split])

    def train_dataloader(self):
        x, labels = samples(0).tensors
        return DataLoader(TensorDataset(x + 1, labels), batch_size=16, shuffle=True)

    def test_dataloader(self):
        return DataLoader(samples(1), batch_size=16)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 2 * F.cross_entropy(model(batch[0]), batch[1])
