import math
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.lightning_modules import FeatureExtractor, MoEClassifier, Schedule

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Recorded(MoEClassifier):
    def __init__(self, schedule: Schedule) -> None:
        super().__init__(FeatureExtractor(nn.Identity(), 6), nn.Linear(6, 3), learning_rate=0.2, schedule=schedule)
        self.rates: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.optimizers().param_groups[0]["lr"])


def rates(schedule: Schedule, num_batches: int = 3, **limits: Any) -> list[float]:
    """Learning rates of every step."""
    data = TensorDataset(torch.randn(8 * num_batches, 6), torch.arange(8 * num_batches) % 3)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    model = Recorded(schedule)
    Trainer(accelerator="cpu", **quiet, **limits).fit(model, DataLoader(data, 8))
    return model.rates


def test_cosine_steps_once_an_epoch() -> None:
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(3)]
    assert rates("cosine", max_epochs=4) == pytest.approx(expected)


def test_linear_rises_for_a_fifth_and_falls_to_nothing() -> None:
    found = rates("linear", num_batches=5, max_epochs=4)  # 20 steps, the fourth at the peak
    assert found[:4] == pytest.approx([0.05, 0.10, 0.15, 0.20])
    assert found[4:] == pytest.approx([0.2 * share / 17 for share in range(16, 0, -1)])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_linear_is_never_zero_and_reaches_its_peak_in_any_length(num_steps: int) -> None:
    found = rates("linear", num_batches=8, max_steps=num_steps, max_epochs=-1)
    assert len(found) == num_steps
    assert min(found) > 0
    assert max(found) == pytest.approx(0.2)


def test_constant() -> None:
    assert set(rates("constant", max_epochs=2)) == {0.2}


def test_cosine_without_an_end_is_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match=r'schedule: expected a finite max_epochs with "cosine", got -1'
    ):
        rates("cosine", max_epochs=-1, max_steps=2)


def test_linear_without_an_end_is_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match=r'schedule: expected a finite max_epochs or max_steps with "linear"'
    ):
        rates("linear", max_epochs=-1)
