"""The base of the analyses: when it runs, what it leaves behind, what an error does."""

import csv
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy

from moe_heads.callbacks import AnalysisInputs, FitEndAnalysis, Report, SharpnessCallback
from tests.support.lightning_models import PlainModule, assert_same, loader, snapshot, trainer


class MeanLoss(FitEndAnalysis):
    """The smallest analysis there can be."""

    name = "mean_loss"

    def compute(self, inputs: AnalysisInputs) -> float:
        assert inputs.loss_fn is not None
        losses = torch.stack([inputs.loss_fn(inputs.model.eval(), batch) for batch in inputs.batches])
        inputs.monitor.step(1, 1)
        return losses.mean().item()

    def report(self, result: float) -> Report:
        return Report({"value": result})


class Failing(MeanLoss):
    name = "failing"

    def __init__(self, error: BaseException, **options: Any) -> None:
        super().__init__(**options)
        self.error = error

    def compute(self, inputs: AnalysisInputs) -> float:
        raise self.error


class Witness(Callback):
    """Records the module's state before and after the analyses, which stand between two witnesses."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = snapshot(pl_module)


def test_runs_at_the_end_of_fit_and_reports() -> None:
    analysis = MeanLoss(splits=["train", "val"])
    fitted = trainer(analysis)
    fitted.fit(PlainModule(), loader(), loader(seed=1))
    assert set(analysis.results) == {"train", "val"}
    assert fitted.callback_metrics["mean_loss/val/value"] == pytest.approx(analysis.results["val"])
    assert analysis.results["train"] != analysis.results["val"]


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_runs_when_nothing_is_trained(options: dict[str, Any]) -> None:
    analysis = MeanLoss(splits=["train"])
    trainer(analysis, **options).fit(PlainModule(), loader())
    assert "train" in analysis.results


def test_runs_after_early_stopping() -> None:
    class Validated(PlainModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", 1.0)

    analysis = MeanLoss(splits=["train"])
    fitted = trainer(analysis, EarlyStopping("val", patience=1, check_on_train_epoch_end=False), max_epochs=9)
    fitted.fit(Validated(), loader(), loader())
    assert fitted.current_epoch < 9
    assert "train" in analysis.results


def test_leaves_the_module_bit_for_bit_as_it_was() -> None:
    before, after = Witness(), Witness()
    first, second = MeanLoss(splits=["train"]), Failing(RuntimeError("half way"), splits=["train"])
    with pytest.warns(UserWarning, match="half way"):
        trainer(before, first, second, after).fit(PlainModule(), loader())
    assert_same({**before.seen, "training": None}, {**after.seen, "training": None})


def test_a_failing_analysis_is_reported_and_the_others_go_on() -> None:
    failing, fine = Failing(RuntimeError("no second derivative"), splits=["train"]), MeanLoss(splits=["train"])
    with pytest.warns(UserWarning, match=r"failing/train: failed with RuntimeError: no second derivative"):
        trainer(failing, fine).fit(PlainModule(), loader())
    assert failing.results == {}
    assert "train" in fine.results


def test_an_error_is_raised_on_request() -> None:
    with pytest.raises(RuntimeError, match="no second derivative"):
        trainer(Failing(RuntimeError("no second derivative"), splits=["train"], on_error="raise")).fit(
            PlainModule(), loader()
        )


def test_ctrl_c_ends_the_analysis_not_the_run() -> None:
    interrupted, fine = Failing(KeyboardInterrupt(), splits=["train"]), MeanLoss(splits=["train"])
    with pytest.warns(UserWarning, match="failing/train: interrupted"):
        trainer(interrupted, fine).fit(PlainModule(), loader())
    assert "train" in fine.results


def test_missing_test_data_falls_back_to_validation_and_says_so() -> None:
    analysis = MeanLoss()
    with pytest.warns(UserWarning, match="no test data; val takes its place"):
        trainer(analysis).fit(PlainModule(), loader(), loader(seed=1))
    assert set(analysis.results) == {"train", "val"}


def test_missing_data_are_skipped_and_said() -> None:
    analysis = MeanLoss(splits=["train", "val"])
    with pytest.warns(UserWarning, match="no val data; the split is skipped"):
        trainer(analysis).fit(PlainModule(), loader())
    assert set(analysis.results) == {"train"}


def test_test_loader_of_the_module_is_used() -> None:
    class Tested(PlainModule):
        def test_dataloader(self) -> Any:
            return loader(seed=7)

    analysis = MeanLoss(splits=["test"], num_samples=1000)
    module = Tested()
    trainer(analysis).fit(module, loader())
    x, y = (torch.cat(parts) for parts in zip(*loader(seed=7), strict=True))
    expected = torch.nn.functional.cross_entropy(module.eval()(x), y)
    assert analysis.results["test"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_modules_setup_that_builds_the_network_is_not_called_again() -> None:
    class Building(PlainModule):
        def setup(self, stage: str) -> None:
            self.head = torch.nn.Linear(8, 3)

        def test_dataloader(self) -> Any:
            torch.rand(1)
            return loader(seed=7)

    before, after = Witness(), Witness()
    trainer(before, MeanLoss(), after).fit(Building(), loader())
    assert_same(before.seen, after.seen)


def test_a_data_module_of_an_earlier_fit_plays_no_part() -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def analysis_dataset(self, split: str) -> Any:
            return loader(num_samples=7).dataset

    class Counting(MeanLoss):
        def compute(self, inputs: AnalysisInputs) -> float:
            return float(sum(len(y) for _, y in inputs.batches))

    analysis = Counting(splits=["train"])
    fitted = trainer(analysis)
    fitted.fit(PlainModule(), datamodule=Data())
    assert analysis.results["train"] == 7
    fitted.fit_loop.max_epochs = 2
    fitted.fit(PlainModule(), loader(num_samples=30))
    assert analysis.results["train"] == 30


def test_fast_dev_run_goes_through_everything_on_few_samples() -> None:
    class Counting(MeanLoss):
        def compute(self, inputs: AnalysisInputs) -> float:
            return float(sum(len(y) for _, y in inputs.batches))

    analysis = Counting(splits=["train"])
    trainer(analysis, fast_dev_run=True).fit(PlainModule(), loader())
    assert analysis.results["train"] == 16


def test_logging_of_the_training_step_is_muted() -> None:
    analysis = MeanLoss(splits=["train"], on_error="raise")
    trainer(analysis).fit(PlainModule(), loader())
    assert "train" in analysis.results


def test_a_loss_that_cannot_be_had_is_told_before_training() -> None:
    class ByHand(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError("trained before the error")

    with pytest.raises(MisconfigurationException, match="ByHand optimises by hand"):
        trainer(MeanLoss()).fit(ByHand(), loader())


def test_sharded_strategies_are_refused() -> None:
    class Sharded:
        strategy = object.__new__(FSDPStrategy)

    with pytest.raises(MisconfigurationException, match="MeanLoss needs the whole model in one process"):
        MeanLoss().setup(Sharded(), PlainModule(), "fit")


def test_runs_of_two_fits_do_not_mix() -> None:
    analysis = MeanLoss(splits=["train", "val"])
    trainer(analysis).fit(PlainModule(), loader(), loader())
    with pytest.warns(UserWarning, match="no val data"):
        trainer(analysis).fit(PlainModule(), loader())
    assert set(analysis.results) == {"train"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": "train"}, "splits: expected a list of 'train', 'val', 'test'; got 'train'"),
        ({"splits": ["dev"]}, r"splits: expected a list of .*; got \['dev'\]"),
        ({"splits": []}, "splits: expected a list"),
        ({"num_samples": 0}, "num_samples: expected an integer of at least 1; got 0"),
        ({"batch_size": 2.5}, "batch_size: expected an integer of at least 1; got 2.5"),
        ({"seed": None}, "seed: expected an integer of at least 0; got None"),
        ({"on_error": "ignore"}, "on_error: expected 'warn' or 'raise'; got 'ignore'"),
        ({"stages": ["predict"]}, r"stages: expected a list of 'fit', 'validate', 'test'; got \['predict'\]"),
        ({"every_n_epochs": 0}, "every_n_epochs: expected an integer of at least 1; got 0"),
        ({"weights": "mean"}, "weights: expected 'last' or 'best'; got 'mean'"),
        ({"max_time": 0}, "max_time: expected a positive number of seconds or None; got 0"),
        ({"name": "/"}, "name: expected the beginning of a key, such as 'sharpness_head'; got '/'"),
        ({"loss_fn": 3}, r"loss_fn: expected loss_fn\(module, batch\) -> scalar; got 3"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanLoss(**options)


def test_an_analysis_without_a_loss_takes_none() -> None:
    with pytest.raises(ValueError, match="loss_fn: expected None, as this analysis evaluates no loss"):
        Weight(loss_fn=lambda model, batch: batch)


# ---- when and with which weights ----


class Weight(FitEndAnalysis):
    """Records one number of the weights that it sees."""

    name = "weight"
    needs_loss = False

    def compute(self, inputs: AnalysisInputs) -> float:
        assert isinstance(inputs.model, PlainModule)
        return inputs.model.body[0].weight[0, 0].item()

    def report(self, result: float) -> Report:
        return Report({"value": result})


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


def test_the_last_tracked_epoch_is_not_analysed_again_at_the_end_of_fit(tmp_path: Any) -> None:
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


def test_sanity_checks_and_validation_in_fit_are_not_analysed() -> None:
    analysis = Weight(splits=["train"])
    trainer(analysis, num_sanity_val_steps=2, max_epochs=2).fit(Evaluated(), loader(), loader())
    assert set(analysis.results) == {"train"}


def test_validate_and_test_analyse_the_split_they_evaluate() -> None:
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
    with pytest.raises(MisconfigurationException, match=r"Weight\(weights='best'\) needs a checkpoint"):
        trainer(Weight(weights="best")).fit(PlainModule(), loader())
    unused = ModelCheckpoint(tmp_path, monitor="val", every_n_epochs=9)
    with pytest.warns(UserWarning, match="the run has written no best checkpoint"):
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
    assert list(second.tracked["train"]) == [2, 3]
    third = fit(2, after_two)
    assert third.tracked == {}
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


def test_two_analyses_of_one_name_are_refused_and_of_two_names_kept_apart() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"two analyses of this Trainer write below 'weight'.*name='wei"
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


def test_a_compiled_module_is_analysed_as_it_was_written() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module: Any = PlainModule()
        sharpness = SharpnessCallback(splits=["train"], num_eigenvalues=1, on_error="raise")
        trainer(sharpness, max_epochs=0).fit(torch.compile(module) if compiled else module, loader())
        found.append(sharpness.results["train"].eigenvalues[0])
    assert found[0] == found[1]
