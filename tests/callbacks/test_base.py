"""Base class of the callbacks: hooks, restored state, and errors."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from moe_heads.callbacks import AnalysisInputs
from tests.support.analyses import Failing, MeanLoss, Weight, Witness
from tests.support.lightning_models import PlainModule, assert_same, loader, trainer


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


def test_missing_test_data_falls_back_to_validation_with_a_warning() -> None:
    analysis = MeanLoss()
    with pytest.warns(UserWarning, match="no test data. Using val data instead"):
        trainer(analysis).fit(PlainModule(), loader(), loader(seed=1))
    assert set(analysis.results) == {"train", "val"}


def test_missing_data_are_skipped_with_a_warning() -> None:
    analysis = MeanLoss(splits=["train", "val"])
    with pytest.warns(UserWarning, match="no val data. The split is skipped"):
        trainer(analysis).fit(PlainModule(), loader())
    assert set(analysis.results) == {"train"}


def test_test_loader_of_the_module_is_used() -> None:
    class Tested(PlainModule):
        def test_dataloader(self) -> Any:
            return loader(seed=7)

    analysis = MeanLoss(splits=["test"], num_samples=1000, batch_size=1000)
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


def test_a_missing_loss_raises_an_error_before_training() -> None:
    class ByHand(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("trained before the error")

    with pytest.raises(MisconfigurationException, match="ByHand: expected automatic optimization"):
        trainer(MeanLoss()).fit(ByHand(), loader())


def test_sharded_strategies_raise_an_error() -> None:
    class Sharded:
        strategy = object.__new__(FSDPStrategy)

    with pytest.raises(
        MisconfigurationException, match="MeanLoss: expected a strategy with the whole model in every process"
    ):
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
        ({"splits": "train"}, "splits: expected a list of some of 'train', 'val', 'test', each once, got 'train'"),
        ({"splits": ["dev"]}, r"splits: expected a list of .*, got \['dev'\]"),
        ({"splits": []}, "splits: expected a list"),
        ({"num_samples": 0}, "num_samples: expected an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected an integer of at least 1, got 2.5"),
        ({"seed": None}, "seed: expected an int from 0 to .*, got None"),
        ({"on_error": "ignore"}, "on_error: expected one of 'warn', 'raise', got 'ignore'"),
        (
            {"stages": ["predict"]},
            r"stages: expected a list of some of 'fit', .*, each once, got \['predict'\]",
        ),
        ({"every_n_epochs": 0}, "every_n_epochs: expected an integer of at least 1 or None, got 0"),
        ({"every_n_train_steps": 0}, "every_n_train_steps: expected an integer of at least 1 or None, got 0"),
        ({"every_n_train_steps": 2.0}, "every_n_train_steps: expected an integer of at least 1 or None, got 2.0"),
        ({"weights": "mean"}, "weights: expected one of 'last', 'best', got 'mean'"),
        ({"max_time": 0}, "max_time: expected a positive number of seconds or None, got 0"),
        ({"name": "/"}, "name: expected the first part of a key, such as 'sharpness_head', got '/'"),
        ({"loss_fn": 3}, r"loss_fn: expected loss_fn\(module, batch\) -> scalar, got 3"),
    ],
)
def test_bad_arguments_raise_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanLoss(**options)


def test_an_analysis_without_a_loss_takes_none() -> None:
    with pytest.raises(ValueError, match="loss_fn: expected None, as this analysis evaluates no loss"):
        Weight(loss_fn=lambda model, batch: batch)
