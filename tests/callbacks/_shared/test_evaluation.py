"""The loss of any LightningModule."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from moe_heads.callbacks._shared.evaluation import (
    check_forward,
    check_initialized,
    draws_random_numbers,
    loss_of,
)


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
def test_training_step_without_a_loss_raises_an_error(output: Any) -> None:
    module = Module(output)
    with pytest.raises(MisconfigurationException, match=r"training_step: expected a tensor or a dict"):
        loss_of(module, None)(module, None)


def test_manual_optimization_needs_a_loss() -> None:
    module, own = Module(None), WithOwnLoss(None)
    module.automatic_optimization = own.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="Module: expected automatic optimization"):
        loss_of(module, None)
    assert loss_of(own, None)(own, None) == 2


def test_a_training_step_that_reads_an_iterator_raises_an_error() -> None:
    class Reading(LightningModule):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            raise AssertionError

    with pytest.raises(
        MisconfigurationException, match=r"Reading\.training_step: expected a batch as argument, got dataloader_iter"
    ):
        loss_of(Reading(), None)


def test_a_module_without_a_training_step_needs_a_loss() -> None:
    with pytest.raises(MisconfigurationException, match="Linear: expected a training_step"):
        loss_of(nn.Linear(1, 1), None)
    with pytest.raises(MisconfigurationException, match="LightningModule: expected a training_step"):
        loss_of(LightningModule(), None)


def test_lazy_layers_raise_an_error_before_the_first_batch() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d())
    with pytest.raises(
        MisconfigurationException, match=r"Sequential: expected initialized parameters, got a lazy 1\.weight"
    ):
        check_initialized(model)
    model(torch.zeros(4, 2))
    check_initialized(model)


def test_a_module_without_forward_needs_a_forward_fn() -> None:
    class Silent(LightningModule):
        pass

    with pytest.raises(MisconfigurationException, match="expected a module with a forward method, got Silent"):
        check_forward("Callback", Silent(), None)
    check_forward("Callback", Silent(), lambda module, batch: batch)


class Drifting(nn.Module):
    """Carries a number from one call to the next, as a recurrent net carries its hidden state."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.step, self.state = step, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.state += self.step
        return self.weight * (x.mean() + self.state)


def test_a_loss_that_differs_on_a_repeat_causes_a_warning_and_no_change() -> None:
    model = Drifting(0.5)
    with pytest.warns(UserWarning, match=r"sharpness/train: the loss of one batch was 1\.5, and 2 on a repeat"):
        assert not draws_random_numbers(model, lambda m, batch: m(batch), [torch.ones(4)], "sharpness/train")
    assert model.state == 0


@pytest.mark.parametrize(
    ("loss_fn", "is_random"),
    [
        (lambda m, batch: m(batch), False),
        (lambda m, batch: m(batch) + torch.randn(()), True),  # torch's random numbers are the same each time
        (lambda m, batch: m(batch) * float("nan"), False),  # warned by the analysis, as not finite
        (lambda m, batch: "no loss", False),  # warned by the analysis, as no scalar
        (lambda m, batch: torch.autograd.grad(m(batch), m.weight, create_graph=True)[0].square(), False),
    ],
)
def test_a_repeatable_loss_is_not_remarked_upon(loss_fn: Any, is_random: bool) -> None:
    assert draws_random_numbers(Drifting(0.0), loss_fn, [torch.ones(4)], "sharpness/train") is is_random


def test_numbers_from_outside_torch_are_noticed() -> None:
    numbers = iter([1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match="draws random numbers outside torch"):
        draws_random_numbers(Drifting(0.0), lambda m, batch: m(batch) * next(numbers), [torch.ones(4)], "x")
