"""Checkpoints and hyperparameters of a classifier, and the command line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from moe_heads import NOISY_TOP_K, Dense, SparseMoE
from moe_heads.lightning_modules import DigitsCNN, MoEClassifier
from tests.support.classifiers import MAKE_HEAD, NUM_CLASSES, NUM_FEATURES, backbone, loader, sparse, trainer

pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")


@pytest.mark.parametrize("kind", MAKE_HEAD)
def test_checkpoint_round_trip(kind: str, tmp_path: Path) -> None:
    head = MAKE_HEAD[kind]()
    model = MoEClassifier(backbone(), head, learning_rate=0.03, label_smoothing=0.1)
    fit = trainer(logger=TensorBoardLogger(str(tmp_path), default_hp_metric=False), log_every_n_steps=1)
    fit.fit(model, loader(), loader())
    path = tmp_path / "model.ckpt"
    fit.save_checkpoint(path)
    new_head = type(head)(
        NUM_FEATURES,
        NUM_CLASSES,
        **{name: model.hparams[name] for name in ("num_experts", "expert_width", "width") if name in model.hparams},
        **(NOISY_TOP_K if isinstance(head, SparseMoE) else {}),
    )
    loaded = MoEClassifier.load_from_checkpoint(path, backbone=backbone(), head=new_head)
    assert loaded.hparams == model.hparams
    assert loaded.head is new_head
    x = torch.randn(5, NUM_FEATURES)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_rates_of_numpy_as_a_sweep_gives_them_stay_loadable(tmp_path: Path) -> None:
    fit = trainer()
    rates = {"learning_rate": np.logspace(-2, -1, 2)[0], "weight_decay": np.float32(1e-4), "momentum": np.float64(0.5)}
    fit.fit(MoEClassifier(backbone(), sparse(), **rates), loader())
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MoEClassifier.load_from_checkpoint(tmp_path / "model.ckpt", backbone=backbone(), head=sparse())
    assert loaded.hparams["learning_rate"] == 0.01 and type(loaded.hparams["weight_decay"]) is float


def test_checkpoint_without_the_modules_says_what_to_pass(tmp_path: Path) -> None:
    fit = trainer()
    fit.fit(MoEClassifier(backbone(), sparse()), loader())
    fit.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(
        ValueError, match=r"backbone: expected .*Module, got 'FeatureExtractor'.*load_from_checkpoint\("
    ):
        MoEClassifier.load_from_checkpoint(tmp_path / "model.ckpt")


def test_hyper_parameters_are_scalars_that_tell_the_runs_apart() -> None:
    model = MoEClassifier(DigitsCNN(), SparseMoE(512 // 8, 10, num_experts=4, expert_width=5, k=2))
    num_head = 64 * 4 * 2 + 4 * (64 * 5 + 5 + 5 * 10 + 10)
    assert dict(model.hparams_initial) == {
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "nesterov": False,
        "schedule": "cosine",
        "label_smoothing": 0.0,
        "channels_last": False,
        "num_classes": None,
        "backbone": "DigitsCNN",
        "head": "SparseMoE",
        "router": "NoisyTopKRouter",
        "num_experts": 4,
        "k": 2,
        "expert_width": 5,
        "num_head_params": sum(p.numel() for p in model.head.parameters()),
        "num_active_head_params": model.head.num_active_parameters,
    }
    assert model.hparams["num_active_head_params"] < model.hparams["num_head_params"] >= num_head - 64 * 4
    json.dumps(dict(model.hparams))
    assert MoEClassifier(DigitsCNN(), Dense(64, 10, width=9)).hparams["width"] == 9


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_lightning_cli_builds_everything_from_yaml_and_its_checkpoint_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "moe_heads.lightning_modules"
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": f"{package}.MoEClassifier",
            "init_args": {
                "backbone": {"class_path": f"{package}.DigitsCNN", "init_args": {"width": 4}},
                "head": {
                    "class_path": "moe_heads.SparseMoE",
                    "init_args": {"in_features": 16, "num_classes": 10, "num_experts": 3, "balance": {"switch": 0.1}},
                },
                "schedule": "constant",
            },
        },
        "data": {"class_path": f"{package}.DigitsDataModule", "init_args": {"limit_train": 60, "batch_size": 30}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["fit", "--config", str(path), "--model.init_args.learning_rate=0.07"]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(args=arguments, save_config_callback=None)
    assert isinstance(cli.model.head, SparseMoE)
    assert cli.model.head.num_experts == 3
    assert cli.model.backbone.num_features == 16
    assert cli.datamodule.limit_train == 60
    assert cli.trainer.global_step == 2
    assert cli.model.hparams["learning_rate"] == 0.07
    assert cli.model.hparams["head"] == "SparseMoE"
    assert all(isinstance(value, str | int | float | None) for value in cli.model.hparams.values())
    assert not [name for name in cli.model.hparams if name.startswith("_")]
    cli.trainer.save_checkpoint(tmp_path / "model.ckpt")
    head = SparseMoE(16, 10, num_experts=3)
    loaded = MoEClassifier.load_from_checkpoint(tmp_path / "model.ckpt", backbone=DigitsCNN(width=4), head=head)
    assert loaded.hparams["learning_rate"] == 0.07
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), cli.model.eval()(x))
