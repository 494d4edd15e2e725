"""The package under its other name: `pytorch_lightning` gives the bits of `lightning.pytorch`."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import SparseMoE
from moe_heads.callbacks import (
    ExpertUtilizationCallback,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from tests.support.events import read_events
from tests.support.lightning_models import loader
from tests.support.sources import ROOT

NAMES = ("lightning.pytorch", "pytorch_lightning")


def module_of(pl: Any) -> Any:
    class Classifier(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
            self.head = SparseMoE(8, 3, num_experts=4, expert_width=4, balance=None)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def test_dataloader(self) -> Any:
            return loader(seed=2)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    torch.manual_seed(0)
    return Classifier()


def run(name: str, folder: Path) -> dict[str, Any]:
    """Fit with all four callbacks and all that looks at classes of Lightning, and return everything that came out."""
    pl: Any = importlib.import_module(name)
    loggers: Any = importlib.import_module(f"{name}.loggers")
    callbacks: Any = importlib.import_module(f"{name}.callbacks")
    analyses = [
        SharpnessCallback(
            every_n_train_steps=4,
            weights="best",
            num_samples=20,
            trace_tolerance=0.9,
            splits=["test"],
            on_error="raise",
        ),
        ExpertUtilizationCallback(every_n_train_steps=3, warn=False, splits=["test"], on_error="raise"),
        LossLandscapeCallback(trajectory=True, plane_points=3, line_points=3, splits=["test"], on_error="raise"),
        InferenceTimingCallback(batch_sizes=(1,), num_runs=2, seconds_per_size=0.01, on_error="raise"),
    ]
    tensorboard = loggers.TensorBoardLogger(folder, default_hp_metric=False)
    table = loggers.CSVLogger(folder)
    checkpoint = callbacks.ModelCheckpoint(dirpath=folder / "checkpoints", monitor="loss", mode="min")
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=[tensorboard, table],
        callbacks=[*analyses, checkpoint, callbacks.RichProgressBar()],
        log_every_n_steps=1,
        enable_model_summary=False,
    )
    module = module_of(pl)
    trainer.fit(module, loader(), loader(seed=1))
    events = read_events(Path(tensorboard.log_dir))
    is_timing = re.compile("inference_timing|.*/(seconds_|overhead)").match
    return {
        "weights": module.state_dict(),
        "metrics": {key: float(v) for key, v in trainer.callback_metrics.items() if not is_timing(key)},
        "results": [callback.report(callback.results["test"]).metrics for callback in analyses[:3]],
        "steps": analyses[0].tracked_steps,
        "scalars": sorted(events.Tags()["scalars"]),
        "images": sorted(events.Tags()["images"]),
        "files": sorted(path.name for path in Path(table.log_dir).rglob("*.npz")),
    }


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other or (one != one and other != other)


def test_both_names_give_the_same_bits(tmp_path: Path) -> None:
    one, other = (run(name, tmp_path / name) for name in NAMES)
    assert_same(one, other)
    assert len(one["scalars"]) > 100 and len(one["images"]) > 10
    assert one["files"] == ["line.npz", "plane.npz", "trajectory.npz"]


def test_several_loaders_of_the_other_name_are_combined() -> None:
    import pytorch_lightning as pl

    module = module_of(pl)
    module.training_step = lambda batch, batch_idx: F.cross_entropy(module(batch[0][0]), batch[0][1])
    mean = SharpnessCallback(splits=["train"], num_samples=16, density=False, on_error="raise")
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[mean], enable_checkpointing=False, **options)
    trainer.fit(module, pl.utilities.CombinedLoader([loader(), loader(seed=3)], mode="min_size"))
    assert mean.results["train"].num_samples == 32


def test_no_second_lightning_is_imported() -> None:
    code = "import sys, moe_heads.callbacks; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def readme_example() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("\n## Example") :]
    found = re.search(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_the_readme_runs_under_both_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = readme_example()
    assert "import lightning.pytorch as pl" in code
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code.replace("import lightning.pytorch as pl", f"import {name} as pl"), "README", "exec"), names)
    assert names["sharpness"].results["train"].converged
