"""Analyses every n optimizer steps: when they run, what they log, and a training that does not notice them."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from moe_heads.callbacks import (
    AnalysisInputs,
    ExpertUtilizationCallback,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from tests.support.analyses import Failing, MeanLoss, Weight
from tests.support.lightning_models import PlainModule, assert_same, loader, snapshot, trainer


def rows_with(logger: CSVLogger, key: str) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get(key)]


class Steps(Callback):
    """Weight after each batch, by the number of optimizer steps."""

    def __init__(self) -> None:
        self.weights: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, PlainModule)
        self.weights[trainer.global_step] = pl_module.body[0].weight[0, 0].item()


@pytest.mark.parametrize("log_every_n_steps", [1, 3])
def test_each_point_has_the_weights_of_its_step_and_is_logged_once(tmp_path: Any, log_every_n_steps: int) -> None:
    steps, tracked, logger = Steps(), Weight(splits=["train"], every_n_train_steps=4), CSVLogger(tmp_path)
    run = trainer(steps, tracked, max_epochs=4, logger=logger, log_every_n_steps=log_every_n_steps)
    run.fit(PlainModule(), loader())  # three batches an epoch
    assert tracked.tracked_steps == {"train": {step: {"value": steps.weights[step]} for step in (4, 8, 12)}}
    assert tracked.tracked == {}
    rows = rows_with(logger, "weight/train/value")
    assert [int(row["step"]) for row in rows] == [4, 8, 12]  # the last is not analyzed again at the end of fit
    assert [float(row["weight/train/value"]) for row in rows] == pytest.approx([steps.weights[s] for s in (4, 8, 12)])
    assert run.callback_metrics["weight/train/value"] == pytest.approx(steps.weights[12])


def test_metrics_are_known_to_the_callbacks_after_it_at_once() -> None:
    seen: dict[int, float] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if "weight/train/value" in trainer.callback_metrics:
                seen[trainer.global_step] = float(trainer.callback_metrics["weight/train/value"])

    tracked = Weight(splits=["train"], every_n_train_steps=2)
    trainer(tracked, Look()).fit(PlainModule(), loader())
    assert list(seen) == [2, 3]
    assert seen[2] == pytest.approx(tracked.tracked_steps["train"][2]["value"])


def test_steps_are_optimizer_steps_of_accumulated_batches() -> None:
    tracked = Weight(splits=["train"], every_n_train_steps=2)
    run = trainer(tracked, accumulate_grad_batches=3, max_epochs=2)
    run.fit(PlainModule(), loader(batch_size=4))  # ten batches an epoch, the last step of which has one
    assert run.global_step == 8
    assert list(tracked.tracked_steps["train"]) == [2, 4, 6, 8]


def test_a_batch_of_two_optimizers_passes_a_multiple_but_does_not_skip_it() -> None:
    class Two(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    tracked = Weight(splits=["train"], every_n_train_steps=3)
    trainer(tracked).fit(Two(), loader(batch_size=8))
    assert list(tracked.tracked_steps["train"]) == [4, 6, 10]


class Validated(PlainModule):
    """Logs everything that a module may log, with states that an analysis could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.batches: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch[0].clone())
        loss = super().training_step(batch, batch_idx)
        self.mean(loss)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log("running", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))


class Journal(Callback):
    """Everything about the training after each batch. It stands behind the analyses."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        state = trainer.optimizers[0].state_dict()["state"]
        momenta = {number: own["momentum_buffer"].clone() for number, own in state.items() if own}
        metrics = {name: value.clone() for name, value in trainer.callback_metrics.items() if "/" not in name}
        stage = str(trainer.state.stage)
        self.entries.append({**snapshot(pl_module), "momenta": momenta, "metrics": metrics, "stage": stage})


def trained(folder: Path, *callbacks: Callback) -> tuple[Any, ...]:
    torch.manual_seed(0)
    journal, logger, module = Journal(), CSVLogger(folder), Validated()
    data = loader(num_samples=64, batch_size=8, shuffle=True)
    defaults = {"max_epochs": 2, "val_check_interval": 3, "accumulate_grad_batches": 2, "num_sanity_val_steps": 1}
    run = trainer(*callbacks, journal, logger=logger, **defaults)
    run.fit(module, data, loader(seed=1))
    own = ("loss", "mean_step", "mean_epoch", "running_step", "running_epoch", "val")
    rows = [(row["epoch"], row["step"], row[name]) for name in own for row in rows_with(logger, name)]
    return journal.entries, module.batches, rows, module.state_dict()


def analyses(**options: Any) -> list[Any]:
    options = {"splits": ["train"], "num_samples": 16, "every_n_train_steps": 2, "on_error": "raise"} | options
    timing = {name: value for name, value in options.items() if name != "num_samples"}
    return [
        SharpnessCallback(num_eigenvalues=1, **options),
        LossLandscapeCallback(line_points=3, plane_splits=[], **options),
        ExpertUtilizationCallback(warn=False, **options),
        InferenceTimingCallback(batch_sizes=(1,), num_runs=1, warmup_runs=0, **timing),
    ]


def without_hooks(recorded: Any) -> Any:
    """Without the number of hooks: those of the utilization stay for the whole fit."""
    if isinstance(recorded, list):
        return dict(enumerate(map(without_hooks, recorded)))
    return {n: v for n, v in recorded.items() if n != "hooks"} if isinstance(recorded, dict) else recorded


def test_the_training_is_bit_for_bit_that_without_analyses(tmp_path: Path) -> None:
    plain, used = trained(tmp_path / "plain"), analyses()
    analyzed = trained(tmp_path / "analyzed", *used)
    for before, after in zip(plain, analyzed, strict=True):
        assert_same(without_hooks(before), without_hooks(after))
    sharpness, landscape, utilization, timing = used
    for analysis in (sharpness, landscape, timing):
        assert list(analysis.tracked_steps["train"]) == [2, 4, 6, 8]
    # no pass of another analysis is counted, though the sharpness stands before it
    windows = utilization.history_steps["head"]
    assert {step: int(stats.num_rows) for step, stats in windows.items()} == dict.fromkeys((2, 4, 6, 8), 32)


def test_workers_that_persist_go_on_with_their_epoch() -> None:
    def batches(*callbacks: Callback) -> list[Tensor]:
        torch.manual_seed(0)
        module, data = Validated(), loader(num_samples=48, batch_size=8).dataset
        workers = DataLoader(data, 8, shuffle=True, num_workers=1, persistent_workers=True)
        trainer(*callbacks, max_epochs=2).fit(module, workers, loader(seed=1))
        return module.batches

    for one, other in zip(batches(), batches(MeanLoss(splits=["train"], every_n_train_steps=2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt()])
def test_an_error_or_ctrl_c_ends_a_point_not_the_training(tmp_path: Path, error: BaseException) -> None:
    failing = Failing(error, splits=["train"], every_n_train_steps=2, stages=["test"])
    plain = trained(tmp_path / "plain")
    with pytest.warns(UserWarning, match=r"failing/train: (failed with RuntimeError: half way|interrupted)"):
        failed = trained(tmp_path / "failed", failing)
    for one, other in zip(plain[0], failed[0], strict=True):
        assert_same(one, other)
    assert failing.tracked_steps == {}


def test_an_error_is_raised_on_request() -> None:
    failing = Failing(RuntimeError("half way"), splits=["train"], every_n_train_steps=2, on_error="raise")
    run = trainer(failing)
    with pytest.raises(RuntimeError, match="half way"):
        run.fit(PlainModule(), loader())
    assert run.global_step == 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You're resuming from a checkpoint")
def test_a_fit_resumed_in_the_middle_of_an_interval_goes_on_with_the_series(tmp_path: Path) -> None:
    def fit(max_steps: int, ckpt_path: Path | None = None) -> Weight:
        analysis = Weight(splits=["train"], every_n_train_steps=4)
        checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=5, save_top_k=-1, filename="{step}")
        run = trainer(analysis, checkpoint, enable_checkpointing=True, max_steps=max_steps, max_epochs=-1)
        run.fit(PlainModule(), loader(batch_size=4), ckpt_path=ckpt_path)
        return analysis

    assert list(fit(6).tracked_steps["train"]) == [4]
    after_five = shutil.copy(tmp_path / "checkpoints" / "step=5.ckpt", tmp_path / "after_five.ckpt")
    assert list(fit(17, after_five).tracked_steps["train"]) == [4, 8, 12, 16]


def test_both_intervals_analyze_the_same_weights_once() -> None:
    class Counting(Weight):
        def compute(self, inputs: AnalysisInputs) -> float:
            counts.append(inputs.split)
            return super().compute(inputs)

    counts: list[str] = []
    both = Counting(splits=["train"], every_n_epochs=1, every_n_train_steps=3)
    trainer(both, max_epochs=2).fit(PlainModule(), loader())
    assert both.tracked["train"][0] == both.tracked_steps["train"][3]
    assert len(counts) == 2


def test_a_new_fit_starts_a_new_series() -> None:
    tracked = Weight(splits=["train"], every_n_train_steps=2)
    for max_epochs in (2, 1):
        trainer(tracked, max_epochs=max_epochs).fit(PlainModule(), loader())
    assert list(tracked.tracked_steps["train"]) == [2]


def test_a_missing_loss_raises_an_error_before_training() -> None:
    class ByHand(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="expected automatic optimization"):
        trainer(SharpnessCallback(stages=["test"], every_n_train_steps=1)).fit(ByHand(), loader())
