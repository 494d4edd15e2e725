"""Small analyses for the tests of their base."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moe_heads.callbacks import AnalysisInputs, FitEndAnalysis, Report
from tests.support.lightning_models import PlainModule, snapshot


class MeanLoss(FitEndAnalysis):
    """The smallest analysis there can be."""

    name = "mean_loss"

    def compute(self, inputs: AnalysisInputs) -> float:
        losses = torch.stack([inputs.loss_fn(inputs.model.eval(), batch) for batch in inputs.batches])
        inputs.progress.step(1, 1)
        return losses.mean().item()

    def report(self, result: float) -> Report:
        return Report({"value": result})


class Failing(MeanLoss):
    """Fails after it changed the model."""

    name = "failing"

    def __init__(self, error: BaseException, **options: Any) -> None:
        super().__init__(**options)
        self.error = error

    def compute(self, inputs: AnalysisInputs) -> float:
        inputs.model.requires_grad_(False)
        raise self.error


class Weight(FitEndAnalysis):
    """Records one number of the weights that it sees."""

    name = "weight"
    needs_loss = False

    def compute(self, inputs: AnalysisInputs) -> float:
        assert isinstance(inputs.model, PlainModule)
        return inputs.model.body[0].weight[0, 0].item()

    def report(self, result: float) -> Report:
        return Report({"value": result})


class Witness(Callback):
    """Records the module's state before and after the analyses, which stand between two witnesses."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = snapshot(pl_module)
