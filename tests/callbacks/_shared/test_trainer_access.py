"""Access to Lightning's private parts, tested with a real Trainer."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from moe_heads.callbacks._shared.trainer_access import analyzing, best_weights, loader_of, to_analysis_device
from tests.support.lightning_models import PlainModule, loader, trainer


class AtFitEnd(Callback):
    """Runs a function where the analyses run."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = self.look(trainer, pl_module)


def at_fit_end(look: Any, module: LightningModule, *data: Any, **options: Any) -> Any:
    callback = AtFitEnd(look)
    trainer(callback, **options).fit(module, *data)
    return callback.seen


def test_loaders_of_every_split() -> None:
    class Data(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.stages: list[str] = []
            self.train, self.val, self.test = (loader(seed=seed) for seed in range(3))

        def setup(self, stage: str) -> None:
            self.stages.append(stage)

        def train_dataloader(self) -> Any:
            return self.train

        def val_dataloader(self) -> Any:
            return self.val

        def test_dataloader(self) -> Any:
            assert "test" in self.stages
            return self.test

    data = Data()
    found = at_fit_end(lambda t, m: [loader_of(t, split) for split in ("train", "val", "test")], PlainModule(), data)
    assert found[0] is data.train
    assert found[1] is data.val
    assert found[2] is data.test


def test_loaders_are_found_when_the_loop_was_skipped() -> None:
    train, val = loader(), loader(seed=1)

    def look(t: Trainer, m: LightningModule) -> Any:
        return loader_of(t, "train"), loader_of(t, "val"), loader_of(t, "test")

    found = at_fit_end(look, PlainModule(), train, val, max_epochs=0)
    assert found[0].dataset is train.dataset
    assert found[1].dataset is val.dataset
    assert found[2] is None


def test_analyzing_mutes_logging_and_leaves_the_stage_of_training() -> None:
    def look(t: Trainer, m: LightningModule) -> Any:
        before = t.state.stage
        with analyzing(t, m):
            m.log("anything", 1.0)
            m.log_dict({"anything": 1.0})
            assert not t.training
            assert m.device == t.strategy.root_device
        assert t.state.stage == before
        return "log" in vars(m)

    assert at_fit_end(look, PlainModule(), loader()) is False


def test_a_modules_own_log_attribute_comes_back() -> None:
    module = PlainModule()
    own = module.__dict__["log"] = lambda *args, **kwargs: None

    def look(t: Trainer, m: LightningModule) -> Any:
        with pytest.raises(RuntimeError, match="stop"), analyzing(t, m):
            raise RuntimeError("stop")
        return vars(m)["log"]

    assert at_fit_end(look, module, loader()) is own


def test_batches_pass_the_modules_own_transfer_hooks_outside_training() -> None:
    class Augmenting(PlainModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 0, batch[1]] if self.trainer.training else [batch[0] * 10, batch[1]]

    def look(t: Trainer, m: LightningModule) -> Any:
        with analyzing(t, m):
            return to_analysis_device(t, [torch.ones(2, 5), torch.zeros(2)])

    assert (at_fit_end(look, Augmenting(), loader())[0] == 20).all()


def test_a_data_module_is_set_up_for_the_test_only_where_it_has_no_loader_yet() -> None:
    class Splitting(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.num_setups, self.test = 0, None

        def setup(self, stage: str) -> None:
            self.num_setups += 1
            self.train, self.test = loader(), loader(seed=1)

        def train_dataloader(self) -> Any:
            return self.train

        def test_dataloader(self) -> Any:
            return self.test

    data = Splitting()
    found = at_fit_end(lambda t, m: loader_of(t, "test"), PlainModule(), data)
    assert found is data.test
    assert data.num_setups == 1


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_an_empty_list_of_loaders_is_no_data() -> None:
    class Empty(PlainModule):
        def val_dataloader(self) -> Any:
            return []

        def test_dataloader(self) -> Any:
            return []

    found = at_fit_end(lambda t, m: [loader_of(t, split) for split in ("val", "test")], Empty(), loader())
    assert found == [None, None]


def test_what_a_step_tells_the_trainer_is_taken_back(tmp_path: Path) -> None:
    module = PlainModule()

    def look(t: Trainer, m: LightningModule) -> Any:
        loggers, metrics = t.loggers, dict(t.callback_metrics)
        with analyzing(t, m):
            t.should_stop = True
            t.callback_metrics["mine"] = torch.tensor(1.0)
            m.logger.log_metrics({"x": 1.0})
        assert t.loggers is loggers
        assert dict(t.callback_metrics) == metrics
        return t.should_stop

    logger = CSVLogger(tmp_path)
    logger.log_metrics = lambda metrics, step=None: pytest.fail("written")
    logger.save = logger.finalize = lambda *args: None
    logger.log_hyperparams = lambda *args: None
    module.training_step = lambda batch, batch_idx: module(batch[0]).sum()
    assert at_fit_end(look, module, loader(), logger=logger) is False


def test_ctrl_c_while_the_module_moves_back_loses_nothing() -> None:
    class Moving(PlainModule):
        moves = 0

        def to(self, *args: Any, **kwargs: Any) -> Any:
            self.moves += 1
            if self.moves == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().to(*args, **kwargs)

    module = Moving()

    def look(t: Trainer, m: LightningModule) -> Any:
        stage, loggers = t.state.stage, t.loggers
        module.moves = 0
        with pytest.raises(KeyboardInterrupt), analyzing(t, m):
            pass
        assert t.state.stage == stage
        assert t.loggers == loggers
        return module.moves

    assert at_fit_end(look, module, loader()) == 2


@pytest.mark.parametrize("monitored_second", [False, True])
def test_the_best_weights_are_those_of_the_checkpoint_that_monitors(tmp_path: Path, monitored_second: bool) -> None:
    class Rising(PlainModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(self.current_epoch))

    plain, best = ModelCheckpoint(tmp_path / "plain"), ModelCheckpoint(tmp_path / "best", monitor="val")

    def look(t: Trainer, m: LightningModule) -> Any:
        before = m.state_dict()["body.0.weight"].clone()
        best_weights(t, m)
        expected = torch.load(best.best_model_path)["state_dict"]["body.0.weight"]
        assert torch.equal(m.state_dict()["body.0.weight"], expected)
        return torch.equal(expected, before)

    callback = AtFitEnd(look)
    checkpoints = [plain, best] if monitored_second else [best, plain]
    trainer(callback, *checkpoints, enable_checkpointing=True, max_epochs=2).fit(Rising(), loader(), loader())
    assert callback.seen is False
