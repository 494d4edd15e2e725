"""A part of a model with recorded outputs in place of the rest. test_sharded_models.py has two processes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import sharpness
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.gathered import Gathered, Quantity, gathered
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from tests.support.sharded_models import SmallNet, batches_of, loss_fn


def part_of(model: nn.Module, *quantities: Quantity, **options: Any) -> Gathered:
    data = Batches.of(batches_of((8, 5)), **options)
    return gathered(model, quantities, data, ["head"], ranks=Ranks(), progress=Progress(), seed=0)


def test_the_part_has_the_values_and_the_curvature_of_the_model() -> None:
    torch.manual_seed(0)
    model = SmallNet().double()

    def doubled(model: nn.Module, batch: Any) -> Tensor:
        return 2 * loss_fn(model, batch)

    part = part_of(model, loss_fn, doubled)
    for item, batch in zip(part.data, batches_of((8, 5)), strict=True):
        torch.testing.assert_close(part.quantities[0](part.model.eval(), item), loss_fn(model.eval(), batch))
        torch.testing.assert_close(part.quantities[1](part.model, item), doubled(model, batch))
    expected = sharpness(model, loss_fn, batches_of((8, 5)), params=["head"], num_eigenvalues=2)
    found = sharpness(part.model, part.quantities[0], part.data, num_eigenvalues=2)
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-9)
    assert found.trace == pytest.approx(expected.trace, rel=1e-6)
    assert found.parameter_names == expected.parameter_names
    # the copies are others
    assert not {id(p) for p in part.model.parameters()} & {id(p) for p in model.parameters()}
    assert not [name for name, p in part.model.named_parameters() if p.requires_grad != name.startswith("head.")]
    assert "backbone" not in "".join(name for name, _ in part.model.named_parameters())


def test_weights_and_sizes_of_the_batches_stay() -> None:
    part = part_of(SmallNet().double(), loss_fn, batch_weight_fn=lambda batch: 3.0 * len(batch[1]))
    assert part.data.sizes == (8, 5)
    assert part.data.weights == (24.0, 15.0)


def test_a_function_of_another_model_is_refused() -> None:
    model = SmallNet().double()
    with pytest.raises(RuntimeError, match="got one that did not run 'backbone' of it"):
        part_of(model, lambda _, batch: loss_fn(model, batch))


def test_a_use_of_more_than_the_output_is_refused() -> None:
    def penalized(model: nn.Module, batch: Any) -> Tensor:
        return loss_fn(model, batch) + model.backbone[0].weight.square().sum()

    class Named(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.backbone.in_features

    model = Named().double()
    model.backbone.in_features = 1
    with pytest.raises(AttributeError, match="uses its attribute 'in_features'"):
        part_of(model, loss_fn)
    with pytest.raises(TypeError):
        part_of(SmallNet().double(), penalized)


def test_a_recorded_module_below_the_head_in_a_second_pass_is_gathered() -> None:
    class Twice(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            first = super().forward(x)
            return first + super().forward(torch.cat([first, x[:, :2]], dim=1))

    torch.manual_seed(0)
    model = Twice().double()
    part = part_of(model, loss_fn)
    assert any(name.startswith("backbone.") for name, _ in part.model.named_parameters())
    loss = part.quantities[0](part.model.eval(), part.data[0])
    torch.testing.assert_close(loss, loss_fn(model.eval(), batches_of((8, 5))[0]))
