"""The timing callback: compiled modules, and programs that a trained module is served as."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import pytorch as pl
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.callbacks import InferenceTimingCallback
from tests.support.lightning_models import PlainModule, assert_same, loader, snapshot


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def in_place(module: Module) -> Any:
    module.compile(backend="eager")
    return module


def wrapped(module: Module) -> Any:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("compiled", [in_place, wrapped])
def test_a_compiled_module_is_labelled_compiled(compiled: Callable[[Module], Any], tmp_path: Path) -> None:
    timing = InferenceTimingCallback(batch_sizes=(2,), num_runs=2, warmup_runs=0, splits=["train"], on_error="raise")
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[timing], default_root_dir=tmp_path, **options)
    run.fit(compiled(Module()), DataLoader(TensorDataset(torch.randn(8, 8), torch.arange(8) % 3), 4))
    result = timing.results["train"]
    assert {(row.module, row.mode) for row in result.rows} == {("model", "compiled"), ("head", "compiled")}
    assert "inference_timing/train/model/batch2/compiled/p50_ms" in run.callback_metrics
    assert result.requests.shapes == {2: ("2×8",)}


def test_programs_are_made_from_the_trained_module() -> None:
    seen: list[tuple[bool, Any]] = []

    def served_fn(module: nn.Module, batch: Any) -> dict[str, Any]:
        seen.append((module.training, batch))
        return {"exported": torch.export.export(module, (batch[0],))}

    callback = InferenceTimingCallback(batch_sizes=(8,), num_runs=6, seconds_per_size=0.05, served_fn=served_fn)
    module = PlainModule().train()
    before = snapshot(module)
    result = callback.analyze(module, test=loader())["test"]
    assert_same(before, snapshot(module))
    ((is_training, batch),) = seen
    assert not is_training and len(batch[0]) == 8
    assert [program.name for program in result.served] == ["exported"] and result.served[0].difference < 1e-6


@pytest.mark.parametrize("wrong", [lambda module: {}, lambda module, batch: torch.relu])
def test_a_served_fn_that_fails_costs_only_its_programs(wrong: Any) -> None:
    callback = InferenceTimingCallback(batch_sizes=(8,), num_runs=6, seconds_per_size=0.05, served_fn=wrong)
    with pytest.warns(UserWarning, match="served_fn: failed with .*Error.*No program is timed"):
        result = callback.analyze(PlainModule(), test=loader())["test"]
    assert result.rows and not result.served


def test_served_fn_is_a_function() -> None:
    with pytest.raises(ValueError, match="served_fn: expected a function"):
        InferenceTimingCallback(served_fn={"exported": None})
