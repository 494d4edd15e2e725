"""Fixtures of the tests of the callbacks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch.loggers import WandbLogger


@pytest.fixture
def wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbLogger]:
    """A W&B logger that reaches neither the network nor the home folder nor the console."""
    import wandb

    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name))
    switches = {"CONSOLE": "off", "ERROR_REPORTING": "false", "MODE": "offline", "SILENT": "true"}
    for name, value in switches.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield WandbLogger(dir=tmp_path, save_dir=tmp_path, offline=True)
    wandb.finish()  # a run that goes on would be used by the next logger
    wandb.teardown()
