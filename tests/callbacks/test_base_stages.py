"""Analyses outside the end of fit: stages, epochs and weights."""

import csv
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from moe_heads.callbacks import (
    AnalysisInputs,
    ExpertUtilizationCallback,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from tests.support.analyses import MeanLoss, Weight, Witness
from tests.support.lightning_models import PlainModule, assert_same, loader, snapshot, trainer


class Evaluated(PlainModule):
    """Has a validation loss that rises, so that the first checkpoint stays the best."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", float(self.current_epoch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def logged(logger: CSVLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


class Epochs(Callback):
    """Weights after each epoch, and all state before and after the analyses of an epoch."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.seen: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PlainModule)
        self.weights.append(pl_module.body[0].weight[0, 0].item())
        self.seen.append({**snapshot(pl_module), "stage": str(trainer.state.stage), "loggers": len(trainer.loggers)})


def test_every_n_epochs_tracks_the_weights_as_they_are_then(tmp_path: Any) -> None:
    before, tracked, after = Epochs(), Weight(splits=["train"], every_n_epochs=2), Epochs()
    logger = CSVLogger(tmp_path)
    run = trainer(before, tracked, after, max_epochs=5, logger=logger)
    run.fit(PlainModule(), loader())
    assert tracked.tracked == {"train": {epoch: {"value": before.weights[epoch]} for epoch in (1, 3)}}
    assert tracked.results == {"train": before.weights[4]}
    for one, other in zip(before.seen, after.seen, strict=True):
        assert_same(one, other)
    rows = [row for row in logged(logger) if row["weight/train/value"]]
    assert [int(row["step"]) for row in rows] == [6, 12, 15]
    assert [float(row["weight/train/value"]) for row in rows] == pytest.approx([before.weights[e] for e in (1, 3, 4)])


def test_the_last_tracked_epoch_is_not_analyzed_again_at_the_end_of_fit(tmp_path: Any) -> None:
    tracked, logger = Weight(splits=["train"], every_n_epochs=2), CSVLogger(tmp_path)
    trainer(tracked, max_epochs=4, logger=logger).fit(PlainModule(), loader())
    rows = [row for row in logged(logger) if row["weight/train/value"]]
    assert [int(row["step"]) for row in rows] == [6, 12]
    assert set(tracked.results) == {"train"}


def test_a_failure_in_one_epoch_leaves_no_result_of_an_earlier_one() -> None:
    class OnlyOnce(Weight):
        def compute(self, inputs: AnalysisInputs) -> float:
            if self.tracked:
                raise RuntimeError("once is enough")
            return super().compute(inputs)

    once = OnlyOnce(splits=["train"], every_n_epochs=1)
    with pytest.warns(UserWarning, match="once is enough"):
        trainer(once, max_epochs=3).fit(PlainModule(), loader())
    assert list(once.tracked["train"]) == [0]
    assert once.results == {}


def test_sanity_checks_and_validation_in_fit_are_not_analyzed() -> None:
    analysis = Weight(splits=["train"])
    trainer(analysis, num_sanity_val_steps=2, max_epochs=2).fit(Evaluated(), loader(), loader())
    assert set(analysis.results) == {"train"}


def test_validate_and_test_analyze_the_split_they_evaluate() -> None:
    sharpness, module = SharpnessCallback(num_eigenvalues=1), Evaluated()
    run = trainer(sharpness)
    before = snapshot(module)
    run.validate(module, loader(seed=1), verbose=False)
    assert set(sharpness.results) == {"val"}
    assert run.callback_metrics["sharpness/val/lambda_max"] == pytest.approx(sharpness.results["val"].eigenvalues[0])
    run.test(module, loader(seed=2), verbose=False)
    assert set(sharpness.results) == {"val", "test"}
    after = snapshot(module)
    for kind in ("state", "grads", "requires_grad", "training", "hooks"):
        assert_same(before[kind], after[kind])
    quiet = SharpnessCallback(stages=["fit"])
    trainer(quiet).validate(module, loader(seed=1), verbose=False)
    assert quiet.results == {}


def test_stages_without_fit_leave_the_end_of_fit_alone() -> None:
    analysis = Weight(stages=["test"])
    trainer(analysis).fit(Evaluated(), loader(), loader())
    assert analysis.results == {}


def test_best_weights_are_loaded_and_the_last_ones_put_back(tmp_path: Any) -> None:
    epochs, best = Epochs(), Weight(splits=["train"], weights="best", every_n_epochs=3)
    before, after = Witness(), Witness()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val", mode="min")
    options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}
    run = trainer(epochs, before, best, after, checkpoint, **options)
    module = Evaluated()
    run.fit(module, loader(), loader())
    assert best.tracked["train"][2]["value"] == epochs.weights[2]
    assert best.results["train"] == epochs.weights[0] != epochs.weights[2]
    assert module.body[0].weight[0, 0].item() == epochs.weights[2]
    assert_same({**before.seen, "training": None}, {**after.seen, "training": None})


def test_best_weights_need_a_checkpoint(tmp_path: Any) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"Weight\(weights='best'\): expected a Trainer that writes checkpoints"
    ):
        trainer(Weight(weights="best")).fit(PlainModule(), loader())
    unused = ModelCheckpoint(tmp_path, monitor="val", every_n_epochs=9)
    with pytest.warns(UserWarning, match="expected a run with a best checkpoint"):
        trainer(Weight(splits=["train"], weights="best"), unused, enable_checkpointing=True).fit(
            Evaluated(), loader(), loader()
        )


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_goes_on_where_it_was(tmp_path: Any) -> None:
    def fit(max_epochs: int, ckpt_path: Path | None = None) -> Weight:
        analysis = Weight(splits=["train"], every_n_epochs=1)
        checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
        run = trainer(analysis, checkpoint, enable_checkpointing=True, max_epochs=max_epochs)
        run.fit(PlainModule(), loader(), ckpt_path=ckpt_path)
        return analysis

    first = fit(2)
    after_two = shutil.copy(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "after_two.ckpt")
    second = fit(4, after_two)
    assert list(first.tracked["train"]) == [0, 1]
    assert list(second.tracked["train"]) == [0, 1, 2, 3]
    third = fit(2, after_two)
    assert third.tracked == first.tracked
    assert third.results == first.results  # nothing was left to train


def test_barebones_and_no_logger_are_fine() -> None:
    analysis = Weight(splits=["train"])
    run = Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[analysis])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning tells what barebones turns off
        run.fit(PlainModule(), loader())
    assert run.callback_metrics["weight/train/value"] == pytest.approx(analysis.results["train"])


def test_overfit_batches_bound_the_sample() -> None:
    class Size(Weight):
        def compute(self, inputs: AnalysisInputs) -> float:
            return float(sum(len(y) for _, y in inputs.batches))

    size = Size(splits=["train"])
    trainer(size, overfit_batches=2).fit(PlainModule(), loader(batch_size=8))
    assert size.results["train"] == 16


def test_two_analyses_of_one_name_raise_an_error_and_of_two_names_are_separate() -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"expected one analysis for each name, got two with the name 'weight'.*name='wei",
    ):
        trainer(Weight(), Weight()).fit(PlainModule(), loader())
    run = trainer(Weight(splits=["train"]), Weight(splits=["train"], name="other"))
    run.fit(PlainModule(), loader())
    assert run.callback_metrics["weight/train/value"] == run.callback_metrics["other/train/value"]


def test_what_the_module_writes_to_its_logger_goes_nowhere(tmp_path: Any) -> None:
    class Writing(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logger.log_metrics({"by_hand": 1.0}, step=self.global_step)
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    trainer(MeanLoss(splits=["train"]), logger=logger).fit(Writing(), loader())
    rows = logged(logger)
    assert sum(bool(row["by_hand"]) for row in rows) == 3  # one a training step


def test_a_compiled_module_is_analyzed_as_it_was_written() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module: Any = PlainModule()
        sharpness = SharpnessCallback(splits=["train"], num_eigenvalues=1, on_error="raise")
        trainer(sharpness, max_epochs=0).fit(torch.compile(module) if compiled else module, loader())
        found.append(sharpness.results["train"].eigenvalues[0])
    assert found[0] == found[1]


def test_every_callback_runs_every_n_epochs() -> None:
    options: dict[str, Any] = {"splits": ["train"], "every_n_epochs": 1}
    analyses = [
        SharpnessCallback(num_eigenvalues=1, **options),
        LossLandscapeCallback(line_points=3, plane_splits=[], **options),
        ExpertUtilizationCallback(**options),
        InferenceTimingCallback(batch_sizes=(1,), num_runs=1, warmup_runs=0, **options),
    ]
    trainer(*analyses, max_epochs=2).fit(PlainModule(), loader())
    assert [list(analysis.tracked["train"]) for analysis in analyses] == [[0, 1]] * 4


def test_a_dry_run_of_the_best_weights_takes_the_last() -> None:
    best = Weight(splits=["train"], weights="best", on_error="raise")
    trainer(best, fast_dev_run=True).fit(PlainModule(), loader())
    assert set(best.results) == {"train"}


def test_a_fit_without_analyses_raises_no_error_for_their_options() -> None:
    class ByHand(Evaluated):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    later = SharpnessCallback(stages=["test"], weights="best", loss_fn=None)
    trainer(later).fit(ByHand(), loader())
    assert later.results == {}
    with pytest.raises(MisconfigurationException, match="expected automatic optimization"):
        trainer(SharpnessCallback(stages=["test"], every_n_epochs=1)).fit(ByHand(), loader())


def test_new_tensors_of_a_training_step_have_the_precision_of_the_trainer() -> None:
    class Noisy(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(torch.ones(len(batch[0]), 5)).square().mean()

    sharpness = SharpnessCallback(splits=["train"], num_eigenvalues=1, on_error="raise")
    trainer(sharpness, precision="64-true").fit(Noisy(), loader())
    assert sharpness.results["train"].eigenvectors.dtype == torch.float64


def test_after_a_fit_validate_and_test_run_on_request() -> None:
    class Counting(Weight):
        def compute(self, inputs: AnalysisInputs) -> float:
            counts.append(inputs.split)
            return super().compute(inputs)

    counts: list[str] = []
    for stages, expected in ((None, ["train"]), (["fit", "test"], ["train", "test"])):
        counts.clear()
        run, module = trainer(Counting(splits=["train"], stages=stages)), Evaluated()
        run.fit(module, loader(), loader())
        run.test(module, loader(), verbose=False)
        assert counts == expected
