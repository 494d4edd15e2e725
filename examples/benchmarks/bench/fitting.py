"""Training of a model by the protocol of the study, without output and checkpoints."""

import sys
from pathlib import Path

from lightning import pytorch as pl

sys.path.insert(0, str(Path(__file__).parents[2]))
from study.build import precision_of
from study.options import Options

from moe_heads.lightning_modules import ImageDataModule, MoEClassifier

__all__ = ["fit"]


def fit(options: Options, model: MoEClassifier, data: ImageDataModule) -> pl.Trainer:
    """Train a model and return its Trainer."""
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        precision=precision_of(options),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    return trainer
