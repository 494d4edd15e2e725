"""The loss of any LightningModule."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from moe_heads.callbacks.evaluation import loss_of


class Module(LightningModule):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def training_step(self, batch: Any) -> Any:
        return self.output


class WithOwnLoss(Module):
    def analysis_loss(self, batch: Any) -> Tensor:
        return torch.tensor(2.0)


def test_the_argument_comes_first_then_the_modules_own_then_the_training_step() -> None:
    own, plain = WithOwnLoss(torch.tensor(3.0)), Module(torch.tensor(3.0))
    assert loss_of(own, lambda model, batch: torch.tensor(1.0))(own, None) == 1
    assert loss_of(own, None)(own, None) == 2
    assert loss_of(plain, None)(plain, None) == 3


def test_training_step_may_return_a_dict_and_take_the_batch_index() -> None:
    class WithIndex(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {"loss": torch.tensor(4.0 + batch_idx), "other": 1}

    module = WithIndex()
    assert loss_of(module, None)(module, None) == 4


def test_the_batch_index_goes_by_any_name() -> None:
    class Underscore(LightningModule):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return torch.tensor(5.0 + _)

    module = Underscore()
    assert loss_of(module, None)(module, None) == 5


@pytest.mark.parametrize("output", [None, {"value": 1}, 3.0])
def test_training_step_without_a_loss_is_refused(output: Any) -> None:
    module = Module(output)
    with pytest.raises(MisconfigurationException, match=r"training_step: expected a tensor or a dict"):
        loss_of(module, None)(module, None)


def test_manual_optimisation_needs_a_loss() -> None:
    module, own = Module(None), WithOwnLoss(None)
    module.automatic_optimization = own.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="Module optimises by hand"):
        loss_of(module, None)
    assert loss_of(own, None)(own, None) == 2
