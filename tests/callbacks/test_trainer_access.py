"""What is read of Lightning's private parts, against a real Trainer."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from moe_heads.callbacks.trainer_access import analysing, loader_of, to_analysis_device
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


def test_analysing_mutes_logging_and_leaves_the_stage_of_training() -> None:
    def look(t: Trainer, m: LightningModule) -> Any:
        before = t.state.stage
        with analysing(t, m):
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
        with pytest.raises(RuntimeError, match="stop"), analysing(t, m):
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
        with analysing(t, m):
            return to_analysis_device(t, [torch.ones(2, 5), torch.zeros(2)])

    assert (at_fit_end(look, Augmenting(), loader())[0] == 20).all()
