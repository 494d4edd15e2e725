"""The callbacks under DDP: two processes agree with one, rank zero writes, no data is lost, and no process hangs."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from moe_heads.callbacks import (
    AnalysisInputs,
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    Report,
    SharpnessCallback,
)
from tests.support.lightning_models import PlainModule, assert_same, loader, snapshot

SHARED = ("sharpness", "gauss_newton", "magnitude", "loss_landscape", "expert_utilization", "every_rank", "stream")


class Resumable(PlainModule):
    """Float64, and the same weights in every run: there is nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].double(), batch[1]


class Witness(Callback):
    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = snapshot(pl_module)


class NothingLost(Callback):
    """Stands behind the analyses and compares with the witness before them, on each rank."""

    def __init__(self, before: Witness) -> None:
        self.before = before

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert_same(self.before.seen, snapshot(pl_module))
        trainer.callback_metrics["nothing_lost"] = torch.tensor(1.0)


class EveryRank(FitEndAnalysis):
    """An analysis that knows nothing of ranks."""

    name = "every_rank"

    def compute(self, inputs: AnalysisInputs) -> float:
        return float(sum(len(batch[1]) * inputs.loss_fn(inputs.model, batch).item() for batch in inputs.batches))

    def report(self, result: float) -> Report:
        return Report({"value": result})


class Stream(IterableDataset[Any]):
    """Gives every process other samples; those of rank zero count."""

    def __iter__(self) -> Any:
        rank = int(os.environ.get("LOCAL_RANK", 0)) if torch.distributed.is_initialized() else 0
        for number in range(20):
            yield torch.full((5,), float(number + 100 * rank)), 0


def stream_loss(module: nn.Module, batch: Any) -> Tensor:
    return module(batch[0] / 20).square().mean()


class OfStream(EveryRank):
    name = "stream"

    def compute(self, inputs: AnalysisInputs) -> float:
        return float(sum(batch[0].sum() for batch in inputs.batches))


class FailingOnOne(FitEndAnalysis):
    """Fails on rank one alone, in the middle of its work."""

    name = "failing"

    def compute(self, inputs: AnalysisInputs) -> float:
        if inputs.context.trainer is not None and inputs.context.trainer.global_rank == 1:
            raise RuntimeError("one rank is gone")
        return 0.0

    def report(self, result: float) -> Report:
        return Report({"value": result})


def callbacks() -> list[Callback]:
    options: dict[str, Any] = {"splits": ["train"], "num_samples": 31, "batch_size": 7}
    outputs: dict[str, Any] = {
        "density": False,
        "outputs_fn": lambda module, batch: module(batch[0]),
        "output_loss": lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    }
    return [
        SharpnessCallback(num_eigenvalues=3, **options),
        SharpnessCallback(matrix="gauss_newton", num_eigenvalues=1, max_probes=8, **outputs, **options),
        SharpnessCallback(
            which="magnitude", num_eigenvalues=2, density=False, max_probes=8, name="magnitude", **options
        ),
        LossLandscapeCallback(line_points=5, plane_points=3, **options),
        ExpertUtilizationCallback(**options),
        InferenceTimingCallback(batch_sizes=(1, 2), num_runs=2, splits=["train"]),
        EveryRank(**options),
        OfStream(splits=["val"], num_samples=12),
    ]


def run(folder: Path, *more: Callback, **options: Any) -> dict[str, float]:
    """Metrics of a fit without an epoch, so that all runs have the same weights."""
    torch.manual_seed(0)
    before = Witness()
    after = NothingLost(before)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 0,
        "logger": CSVLogger(folder),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "precision": "64-true",
        "log_every_n_steps": 1,
    }
    trainer = Trainer(callbacks=[before, *callbacks(), *more, after], **(defaults | options))
    trainer.fit(Resumable(), loader(), DataLoader(Stream(), batch_size=4))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return run(tmp_path_factory.mktemp("alone"))


def assert_equal(found: dict[str, float], alone: dict[str, float]) -> None:
    assert found["nothing_lost"] == 1
    assert set(found) == set(alone)
    for name in alone:
        if name.startswith(SHARED):
            assert found[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-9), name
    assert any(name.startswith("inference_timing/train/model") for name in found)


def written(folder: Path) -> list[str]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return list(next(csv.reader(file)))


@pytest.mark.slow  # the launched processes below, which are the default, do the same work
def test_spawned_processes_find_what_one_finds(alone: dict[str, float], tmp_path: Path) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    found = run(tmp_path, strategy=strategy, devices=2)
    assert_equal(found, alone)
    assert set(written(tmp_path)) >= set(alone) - {"nothing_lost"}


SCRIPT = """
import sys, json, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.callbacks.test_distributed import *
{body}
"""


def launch(tmp_path: Path, body: str, **options: Any) -> subprocess.Popen[str]:
    """A script that the Trainer launches once more for the second rank, as `python train.py` does for a user."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(body=body))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "default"}
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


# Forked in a process of their own: torch does not allow a backward pass in a fork of a process whose autograd has
# threads, which another test may have started.
FORKED = 'DDPStrategy(process_group_backend="gloo", start_method="fork")'


@pytest.mark.slow
def test_forked_processes_find_what_one_finds(alone: dict[str, float], tmp_path: Path) -> None:
    process = launch(
        tmp_path,
        f"""
metrics = run(Path("logs"), strategy={FORKED}, devices=2)
Path("metrics.json").write_text(json.dumps(metrics))
""",
    )
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert_equal(json.loads((tmp_path / "metrics.json").read_text()), alone)
    assert set(written(tmp_path)) >= set(alone) - {"nothing_lost"}


@pytest.mark.slow  # 10 s
def test_our_own_classifier_and_data_train_on_two_processes(tmp_path: Path) -> None:
    """Lightning builds the loaders again with a distributed sampler; it could not when one was built by position."""
    process = launch(
        tmp_path,
        f"""
from moe_heads import SparseMoE
from moe_heads.lightning_modules import DigitsCNN, DigitsDataModule, MoEClassifier

trainer = Trainer(
    accelerator="cpu",
    devices=2,
    strategy={FORKED},
    max_epochs=1,
    limit_train_batches=2,
    limit_val_batches=1,
    enable_checkpointing=False,
    log_every_n_steps=1,
    callbacks=[ExpertUtilizationCallback(splits=["train"], num_samples=100, detail="full")],
    enable_progress_bar=False,
    enable_model_summary=False,
    logger=False,
)
head = SparseMoE(64, 10, num_experts=4, expert_width=8)
trainer.fit(MoEClassifier(DigitsCNN(), head, learning_rate=0.01), datamodule=DigitsDataModule())
Path("rows.txt").write_text(str(float(trainer.callback_metrics["expert_utilization/train/head/num_rows"])))
""",
    )
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert float((tmp_path / "rows.txt").read_text()) == 100


def test_launched_processes_agree_with_one_and_do_not_hang_after_a_failure_on_one_rank(
    alone: dict[str, float], tmp_path: Path
) -> None:
    process = launch(
        tmp_path,
        """
metrics = run(Path("logs"), FailingOnOne(splits=["train"]), strategy="ddp", devices=2)
Path(f"metrics{torch.distributed.get_rank()}.json").write_text(json.dumps(metrics))
""",
    )
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    for rank in range(2):
        assert_equal(json.loads((tmp_path / f"metrics{rank}.json").read_text()), alone)
    assert output.count("failing/train: failed with RankError: rank 1: RuntimeError: one rank is gone") == 1
    assert not any(name.startswith("failing") for name in written(tmp_path))


@pytest.mark.slow  # 25 s; test_analysis_ranks.py has Ctrl-C without a launch
def test_ctrl_c_reaches_all_ranks_and_the_run_ends_well(tmp_path: Path) -> None:
    process = launch(
        tmp_path,
        """
def slow(module, batch):
    Path(f"started{torch.distributed.get_rank()}").touch()
    time.sleep(0.2)
    return nn.functional.cross_entropy(module(batch[0]), batch[1])

slow_one = SharpnessCallback(name="slow", splits=["train"], loss_fn=slow, num_samples=8)
metrics = run(Path("logs"), slow_one, strategy="ddp", devices=2)
Path(f"metrics{torch.distributed.get_rank()}.json").write_text(json.dumps(metrics))
""",
    )
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"started{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "slow/train: interrupted" in output
    assert all((tmp_path / f"metrics{rank}.json").exists() for rank in range(2))
