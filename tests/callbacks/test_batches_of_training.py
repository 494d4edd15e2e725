"""Batches in a Trainer's run: numbers of samples, copies, and modules that need whole batches."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.analysis import sharpness
from moe_heads.callbacks import ExpertUtilizationCallback, LossLandscapeCallback, SharpnessCallback
from tests.support.lightning_models import trainer


class Module(LightningModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def analyzed(module: LightningModule, loader: Any, **options: Any) -> Any:
    callback = SharpnessCallback(splits=["train"], on_error="raise", density=False, **options)
    trainer(callback).fit(module, loader)
    return callback.results["train"]


class Popping(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["x"].div_(2)
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch.pop("labels")
        return F.cross_entropy(self.net(batch["x"].sub_(1)), labels)


def test_a_step_that_changes_its_batch() -> None:
    x = torch.randn(60, 6)
    module = Popping()
    found = analyzed(module, DataLoader([{"x": x[i].clone(), "labels": i % 3} for i in range(60)], batch_size=20))
    true = sharpness(module.net, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x / 2 - 1, torch.arange(60) % 3)])
    assert found.eigenvalues[0] == pytest.approx(true.eigenvalues[0], rel=1e-4)
    assert found.num_samples == 60


class TimeFirst(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 6), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, n, y = batch
        return F.cross_entropy(self.out(torch.tanh(self.embed(x))[n - 1, torch.arange(len(n))]), y)


def test_the_callback_knows_the_number_of_samples() -> None:
    data = [(torch.randint(1, 20, (4 if i < 50 else 30,)), i % 3) for i in range(100)]

    def collate(items: Any) -> Any:
        return (
            pad_sequence([x for x, _ in items]),
            torch.tensor([len(x) for x, _ in items]),
            torch.tensor([y for _, y in items]),
        )

    module = TimeFirst()
    many = analyzed(module, DataLoader(data, batch_size=30, collate_fn=collate))
    one = analyzed(module, DataLoader(data, batch_size=100, collate_fn=collate), batch_size=100)
    assert many.num_samples == one.num_samples == 100
    assert many.eigenvalues[0] == pytest.approx(one.eigenvalues[0], rel=1e-4)


class FixedState(Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.RNN(4, 6, batch_first=True), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.out(self.rnn(batch[0], torch.zeros(1, 64, 6))[0][:, -1]), batch[1])


def test_a_module_with_a_hidden_state_of_fixed_size() -> None:
    data = TensorDataset(torch.randn(128, 5, 4), torch.arange(128) % 3)
    loader = DataLoader(data, batch_size=64)
    assert analyzed(FixedState(), loader, batch_size=64).num_samples == 128
    with pytest.raises(RuntimeError) as caught:
        analyzed(FixedState(), loader)  # in batches of 50
    assert "pass batch_size=64" in caught.value.__notes__[0]


class GraphNet(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(10, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, adjacency, y = batch
        return F.cross_entropy(adjacency @ self.net(x), y)


@pytest.mark.filterwarnings("ignore:.*float32 does not resolve eigenvalues of this size")
def test_a_full_graph() -> None:
    graph = (torch.randn(120, 10), torch.rand(120, 120) / 120, torch.randint(0, 3, (120,)))
    assert analyzed(GraphNet(), DataLoader([graph], batch_size=None)).num_samples == 120


class Graphs:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: Any) -> "Graphs":
        return Graphs(self.x.to(device), self.y.to(device))


class OfGraphs(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch.x), batch.y)


def test_objects_with_tensors_inside() -> None:
    x, y = torch.randn(30, 4), torch.arange(30) % 3

    def collate(items: Any) -> Graphs:
        return Graphs(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))

    assert analyzed(OfGraphs(), DataLoader(TensorDataset(x, y), batch_size=10, collate_fn=collate)).num_samples == 30
    whole: DataLoader[Any] = DataLoader([Graphs(x[:20], y[:20]), Graphs(x[20:], y[20:])], batch_size=None)
    with pytest.raises(ValueError, match="Pass batch_size_fn"):
        analyzed(OfGraphs(), whole)
    assert analyzed(OfGraphs(), whole, batch_size_fn=lambda batch: len(batch.y)).num_samples == 30


class Weighted(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_loss_that_is_not_a_mean_causes_one_warning_with_the_callbacks_prefix() -> None:
    y = torch.where(torch.arange(60) < 25, -100, torch.arange(60) % 3)
    loader = DataLoader(TensorDataset(torch.randn(60, 6), y), batch_size=20)
    module = Weighted()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        analyzed(module, loader, perturbation=True)
    warned = [str(warning.message) for warning in caught if "sharpness/" in str(warning.message)]
    assert len(warned) == 1
    assert warned[0].startswith(
        "sharpness/train: loss_fn: expected the mean over the samples of a batch, got a loss that"
    )
    weigh: dict[str, Any] = {"batch_weight_fn": lambda batch: (batch[1] != -100).sum()}
    many, one = (analyzed(module, loader, batch_size=size, **weigh) for size in (7, 60))
    assert many.eigenvalues[0] == pytest.approx(one.eigenvalues[0], rel=1e-4)
    landscape = LossLandscapeCallback(splits=["train"], on_error="raise", line_points=3, plane_points=3, **weigh)
    trainer(landscape).fit(module, loader)


def test_the_trainers_mode_of_several_loaders_is_known() -> None:
    class Two(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx) + 0 * self.net(batch["b"][0]).mean()

    a = DataLoader(TensorDataset(torch.randn(30, 6), torch.arange(30) % 3), batch_size=10)
    b = DataLoader(TensorDataset(torch.randn(20, 6)), batch_size=10)
    assert analyzed(Two(), {"a": a, "b": b}).num_samples == 60
    assert analyzed(Two(), CombinedLoader({"a": a, "b": b}, "min_size")).num_samples == 40


@pytest.mark.parametrize("name", ["batch_size_fn", "batch_weight_fn"])
def test_functions_have_to_be_functions(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected {name}\(batch\) -> number, got 3"):
        SharpnessCallback(**{name: 3})


def test_weights_without_a_loss_raise_an_error() -> None:
    with pytest.raises(ValueError, match="batch_weight_fn: expected None, as this analysis evaluates no loss"):
        ExpertUtilizationCallback(batch_weight_fn=len)


@pytest.mark.parametrize("given", [(torch.zeros(4, 2), torch.zeros(4)), [torch.zeros(4, 2), torch.zeros(4).long()]])
def test_one_batch_in_place_of_a_loader_raises_an_error(given: Any) -> None:
    with pytest.raises(ValueError, match=r"train: expected a loader or a list of batches, got .* Pass \[\(X, y\)\]"):
        SharpnessCallback(loss_fn=lambda m, b: m(b).mean()).analyze(nn.Linear(2, 1), train=given)
