"""Attach the analyses to an existing LightningModule, without arguments and without changes to the module.

python examples/attach_callbacks.py
"""

import torch
from lightning import pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.callbacks import LossLandscapeCallback, SharpnessCallback


class Regression(pl.LightningModule):
    """A module without any reference to this package."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(max_epochs: int = 20) -> SharpnessCallback:
    """Fit a sine and print the curvature at the solution."""
    pl.seed_everything(0)
    x = 4 * torch.rand(512, 2) - 2
    data = TensorDataset(x, torch.sin(x.sum(-1, keepdim=True)))
    sharpness = SharpnessCallback(splits=["train"])
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=TensorBoardLogger("runs", name="attach_callbacks", default_hp_metric=False),
        callbacks=[sharpness, LossLandscapeCallback(splits=["train"])],
        enable_model_summary=False,
        log_every_n_steps=8,
    )
    trainer.fit(Regression(), DataLoader(data, batch_size=64, shuffle=True))
    print(sharpness.results["train"].summary())
    return sharpness


if __name__ == "__main__":
    main()
