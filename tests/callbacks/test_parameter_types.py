"""Unsupported parameter types raise an error before training, and half precision is supported."""

import warnings
from typing import Any

import pytest
import torch
from lightning import pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.analysis import direction_sweep, perturbation_sharpness, random_direction, sharpness
from moe_heads.callbacks import LossLandscapeCallback, SharpnessCallback


class Net(pl.LightningModule):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head, self.steps = backbone, nn.Linear(5, 3), 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.steps += self.training
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


def fit(model: Net, callback: Any, precision: Any = "32-true") -> list[str]:
    data = TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options |= {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, "precision": precision}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pl.Trainer(callbacks=[callback], **options).fit(model, DataLoader(data, 10))
    return [str(w.message) for w in caught]


def half() -> nn.Module:
    return nn.Linear(4, 5).bfloat16()


@pytest.mark.parametrize("kind", [SharpnessCallback, LossLandscapeCallback])
def test_complex_parameters_raise_an_error_before_training(kind: Any) -> None:
    model = Net(Complex())
    with pytest.raises(
        MisconfigurationException, match=r"'backbone\.weight' of type torch\.complex64.*view_as_complex"
    ):
        fit(model, kind())
    assert model.steps == 0


@pytest.mark.parametrize(("backbone", "precision"), [(half, "bf16-mixed"), (lambda: nn.Linear(4, 5), "bf16-true")])
def test_half_parameters_that_train_raise_an_error_before_training(backbone: Any, precision: str) -> None:
    model = Net(backbone())
    with pytest.raises(MisconfigurationException, match=r"'backbone\.\w+' is in half precision: freeze it"):
        fit(model, SharpnessCallback(), precision)
    assert model.steps == 0


def test_a_landscape_warns_before_training_of_its_missing_line() -> None:
    callback = LossLandscapeCallback(splits=["train"], plane_points=3)
    warned = fit(Net(nn.Linear(4, 5)), callback, "bf16-true")
    assert any("The landscape has no line" in message for message in warned)
    assert callback.results["train"].plane is not None and callback.results["train"].line is None


def test_only_analyzed_parameters_raise_an_error() -> None:
    for model in (Net(half()), Net(Complex())):
        callback = SharpnessCallback(splits=["train"], params=["head"], on_error="raise")
        fit(model, callback, "bf16-mixed" if isinstance(model.backbone, nn.Linear) else "32-true")
        assert callback.results["train"].eigenvalues_converged
    model = Net(Complex())
    fit(model, SharpnessCallback(stages=["test"]))
    assert model.steps == 2


@pytest.mark.parametrize("kind", [SharpnessCallback, LossLandscapeCallback])
def test_a_frozen_half_backbone_is_analyzed(kind: Any) -> None:
    callback = kind(splits=["train"], on_error="raise")
    fit(Net(half().requires_grad_(False)), callback, "bf16-mixed")
    assert list(callback.results) == ["train"]


def test_functions_refuse_complex_parameters_and_name_real_ones() -> None:
    model = nn.Sequential(Complex(), nn.Linear(5, 1))

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).square().mean()

    batch = torch.randn(6, 4)
    for analysis in (sharpness, perturbation_sharpness, direction_sweep):
        with pytest.raises(ValueError, match=r"expected real parameters.*params=\['1\.weight'\]"):
            analysis(model, loss, [batch])
    with pytest.raises(ValueError, match="expected real parameters"):
        random_direction(model)
    assert sharpness(model, loss, [batch], params=["1"], num_eigenvalues=1).converged
