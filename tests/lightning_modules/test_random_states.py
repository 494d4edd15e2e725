"""Equality of a resumed and an uninterrupted training."""

from pathlib import Path

import pytest
import torch
from lightning import pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from moe_heads import SparseMoE
from moe_heads.lightning_modules import DigitsCNN, DigitsDataModule, MoEClassifier, RandomStates


def trained(folder: Path, max_epochs: int, resume: Path | None, restores: bool = True) -> dict[str, torch.Tensor]:
    """Weights after the training; the schedule is constant, so that its length does not matter."""
    pl.seed_everything(1, verbose=False)
    model = MoEClassifier(DigitsCNN(), SparseMoE(64, 10), schedule="constant", learning_rate=0.05)
    if resume is not None:
        torch.rand(17)  # what a new process has drawn in between is another number
    checkpoint = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoint, *([RandomStates()] if restores else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DigitsDataModule(limit_train=128), ckpt_path=resume)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:Found keys that are in the model state dict")
@pytest.mark.parametrize("restores", [True, False])
def test_resumed_is_uninterrupted(tmp_path: Path, restores: bool) -> None:
    whole = trained(tmp_path / "whole", 3, None, restores)
    trained(tmp_path / "parts", 1, None, restores)
    parts = trained(tmp_path / "parts", 3, tmp_path / "parts" / "last.ckpt", restores)
    same = all(torch.equal(whole[name], parts[name]) for name in whole)
    assert same == restores, "without the callback another shuffle must show, or this test could not fail"
