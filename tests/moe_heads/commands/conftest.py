"""Checkpoints of small models, and one that a Trainer has written."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from moe_heads.callbacks import ExpertUtilizationCallback, FitEndAnalysis, LossLandscapeCallback, SharpnessCallback
from tests.support.checkpoint_models import Data, Model, data
from tests.support.matching import cross_entropy, permute_randomly


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, FitEndAnalysis]]:
    """A checkpoint, and the callbacks that analyzed the same weights under the Trainer."""
    path = tmp_path_factory.mktemp("trained") / "trained.ckpt"
    landscape = LossLandscapeCallback(splits=["train"], num_samples=20, line_points=3, plane_points=3)
    fit([landscape], path)  # alone: next to a SharpnessCallback, the landscape takes its eigenvectors
    others = {
        "sharpness": SharpnessCallback(num_samples=20, num_eigenvalues=1),
        "expert_utilization": ExpertUtilizationCallback(num_samples=20, warn=False),
    }
    fit(list(others.values()), path)
    return path, {**others, "loss_landscape": landscape}


def fit(callbacks: list[FitEndAnalysis], path: Path) -> None:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
    )
    trainer.fit(Model(), datamodule=Data())
    trainer.save_checkpoint(path)


@pytest.fixture(scope="session")
def permuted(trained: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with permuted units, experts and router rows."""
    model = Model()
    model.load_state_dict(torch.load(trained[0], weights_only=True)["state_dict"])
    batch = next(iter(data()["test"]))
    tensors = permute_randomly(model.eval(), cross_entropy, batch, seed=1)
    path = tmp_path_factory.mktemp("permuted") / "permuted.ckpt"
    torch.save({"state_dict": {name: tensors[name] for name in model.state_dict()}}, path)
    return path
