import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.unsupported_layer import unsupported_layer
from tests.support.hessians import Once


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.inner(x))


@pytest.mark.parametrize(
    ("layer", "expected"), [(nn.Hardsigmoid(), "1.2 (Hardsigmoid)"), (Fused(), "1.2 (Fused)"), (nn.Tanh(), None)]
)
def test_names_the_innermost_module(layer: nn.Module, expected: str | None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4), layer), nn.Linear(4, 1))
    hooks = [len(m._forward_hooks) for m in model.modules()]

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).square().mean()

    if expected is None:
        assert HessianOperator(model, loss, [torch.randn(5, 3)]).matvec(torch.ones(41)).any()
    else:
        with pytest.raises(RuntimeError) as caught:
            operator = HessianOperator(model, loss, [torch.randn(5, 3)])
            operator.matvec(torch.ones(operator.num_parameters))
        assert str(caught.value).startswith(f"{expected}: a layer of the model has no second derivative")
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_an_operation_of_the_loss_is_in_no_module() -> None:
    model = nn.Linear(3, 1)
    message = "derivative for aten::hardsigmoid_backward is not implemented"
    assert unsupported_layer(model, lambda: nn.functional.hardsigmoid(model(torch.randn(2, 3))).sum(), message) == ""
