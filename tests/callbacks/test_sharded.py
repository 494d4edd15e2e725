"""The callbacks under `ModelParallelStrategy` with FSDP2: two processes agree with one, and nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from moe_heads import SparseMoE
from moe_heads.callbacks import (
    AnalysisInputs,
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    Report,
    SharpnessCallback,
)
from tests.support.lightning_models import loader
from tests.support.sharded_models import assert_same, local_state

SCRIPT = """
import json, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.callbacks.test_sharded import fit
metrics = fit(num_processes=2)
Path(f"metrics{torch.distributed.get_rank()}.json").write_text(json.dumps(metrics))
"""


class Sharded(LightningModule):
    """Float64, and a learning rate of zero, so that all runs have the same weights."""

    def __init__(self, *, shards: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.head = SparseMoE(6, 3, num_experts=4, expert_width=4, balance=None)
        self._shards = shards
        self.double()

    def configure_model(self) -> None:
        if self._shards:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.backbone, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].double(), batch[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def analysis_accuracy(self, batch: Any) -> Tensor:
        return (self(batch[0]).argmax(1) == batch[1]).double().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.0)


def wave(module: nn.Module, batch: Any) -> Tensor:
    """A loss whose curvature no finite difference resolves."""
    return (1e9 * module(batch[0])).sin().mean()


class OfUser(FitEndAnalysis):
    name = "of_user"

    def compute(self, inputs: AnalysisInputs) -> float:
        return float(inputs.loss_fn(inputs.model, inputs.batches[0]))

    def report(self, result: float) -> Report:
        return Report({"value": result})


class Witness(Callback):
    """Stands before and behind the analyses, and compares."""

    def __init__(self, before: "Witness | None" = None) -> None:
        self.before = before
        self.seen: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = local_state(pl_module) | {
            "optimizer": {
                f"{number} {key}": value.to_local().clone() if hasattr(value, "to_local") else value
                for number, state in enumerate(trainer.optimizers[0].state.values())
                for key, value in state.items()
            }
        }
        if self.before is not None:
            assert_same(self.before.seen, self.seen)
            trainer.callback_metrics["nothing_lost"] = torch.tensor(1.0)


def fit(num_processes: int) -> dict[str, float]:
    options: dict[str, Any] = {"splits": ["train"], "num_samples": 31, "batch_size": 16}
    before = Witness()
    analyses = [
        ExpertUtilizationCallback(**options),
        LossLandscapeCallback(line_points=3, plane_points=3, **options),
        LossLandscapeCallback(line_points=3, plane_points=3, params=["head"], name="landscape_head", **options),
        SharpnessCallback(num_eigenvalues=1, max_probes=8, params=["head"], name="sharpness_head", **options),
        SharpnessCallback(num_eigenvalues=1, density=False, loss_fn=wave, name="sharpness_wave", **options),
        InferenceTimingCallback(splits=["train"], batch_sizes=(1,), num_runs=2),
        OfUser(**options),
    ]
    strategy: Any = "auto"
    if num_processes > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=num_processes, tensor_parallel_size=1, process_group_backend="gloo"
        )
    trainer = Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[before, *analyses, Witness(before)],
    )
    trainer.fit(Sharded(shards=num_processes > 1), loader(), loader(seed=1))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.slow  # the functions are tested in two processes in tests/moe_heads/analysis/test_sharded_models.py
@pytest.mark.filterwarnings("ignore")
def test_two_processes_with_a_sharded_model_find_what_one_finds(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "default"}
    process = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output
    alone = fit(num_processes=1)
    for rank in range(2):
        found = json.loads((tmp_path / f"metrics{rank}.json").read_text())
        assert found["nothing_lost"] == 1
        for name in ("expert_utilization/train/head", "expert_utilization/epoch/head", "loss_landscape/train/line"):
            assert any(key.startswith(name) for key in found), name
        assert {name.split("/")[0] for name in alone} - {name.split("/")[0] for name in found} == {
            "inference_timing",
            "of_user",
            "sharpness_wave",
        }
        # of batches of other sizes
        gradients = {name for name in found if name.endswith("router_gradient_norm")}
        for name in found.keys() - gradients:
            assert found[name] == pytest.approx(alone[name], rel=1e-6, abs=1e-9), name
    assert output.count("InferenceTimingCallback: left out under ModelParallelStrategy: rank zero measures alone") == 1
    assert output.count("OfUser: left out under ModelParallelStrategy") == 1
    assert output.count("sharpness_wave/train: failed with StepsDisagreeError") == 1
    assert "got products that differ by" in output
    assert "Analyze a checkpoint in one process" in output
