"""Functions without a second derivative have the same values and gradients as those of torch, and a Hessian."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis import sharpness
from moe_heads.analysis._shared.plain_functions import plain_functions

ENTRIES = [
    *((torch._C._nn, name) for name in ("hardsigmoid", "hardsigmoid_", "hardswish", "hardswish_")),
    *((torch._C._nn, name) for name in ("multi_margin_loss", "multilabel_margin_loss")),
    (torch, "embedding_bag"),
]

BAGS = torch.tensor([1, 3, 2, 5, 2, 0, 4])
OFFSETS = torch.tensor([0, 2, 2, 5])
SHARES = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
LABELS = torch.tensor([3, 0, 5, 1])
MARKED = torch.tensor([[2, 4, -1, 1, 0, 0], [0, -1, -1, -1, -1, -1], [5, 1, 3, 0, 2, 4], [-1, 0, 0, 0, 0, 0]])
WEIGHTS = torch.linspace(0.5, 2, 6, dtype=torch.float64)

# as they are called: with a float64 matrix (6, 6) or its first four rows
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "hardswish": lambda x: F.hardswish(x),
    "hardsigmoid in place": lambda x: F.hardsigmoid(x * 1, inplace=True),
    "hardswish in place": lambda x: F.hardswish(x * 1, inplace=True),
    "a view in place": lambda x: _with_view_changed(x * 1),
    "modules": nn.Sequential(nn.Hardswish(), nn.Hardsigmoid(inplace=True)),
    **{
        f"bags, {mode}, {options}": lambda x, mode=mode, options=options: F.embedding_bag(  # type: ignore[misc]
            BAGS, x, OFFSETS, mode=mode, **options
        )
        for mode in ("sum", "mean", "max")
        for options in ({}, {"padding_idx": 2}, {"padding_idx": -4})
    },
    "bags with weights": lambda x: F.embedding_bag(BAGS, x, OFFSETS, mode="sum", per_sample_weights=SHARES),
    "weights of bags": lambda x: F.embedding_bag(
        BAGS,
        torch.ones(6, 2, dtype=x.dtype) * WEIGHTS[:, None],
        OFFSETS,
        mode="sum",
        per_sample_weights=x.flatten()[:7],
    ),
    "last offset": lambda x: F.embedding_bag(BAGS, x, torch.tensor([0, 2, 7]), include_last_offset=True),
    "rows": lambda x: F.embedding_bag(BAGS[:6].view(2, 3), x, mode="mean"),
    **{
        f"margins, {p}, {reduction}": lambda x, p=p, reduction=reduction: F.multi_margin_loss(  # type: ignore[misc]
            x[:4], LABELS, p=p, margin=0.7, weight=WEIGHTS, reduction=reduction
        )
        for p in (1, 2)
        for reduction in ("mean", "sum", "none")
    },
    "margins of one sample": lambda x: F.multi_margin_loss(x[0], LABELS[0]),
    **{
        f"labels, {reduction}": lambda x, reduction=reduction: F.multilabel_margin_loss(  # type: ignore[misc]
            x[:4], MARKED, reduction=reduction
        )
        for reduction in ("mean", "sum", "none")
    },
    "labels of one sample": lambda x: F.multilabel_margin_loss(x[0], MARKED[0]),
}


def _with_view_changed(x: Tensor) -> Tensor:
    F.hardswish(x[:, :3], inplace=True)
    return x * x


def matrix() -> Tensor:
    drawn = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (drawn * 3).requires_grad_()


def curve(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = function(x)
    return (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sin().sum()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_torch_and_the_hessian_that_of_differences(name: str) -> None:
    function, x = FUNCTIONS[name], matrix()
    expected = function(x)
    (expected_gradient,) = torch.autograd.grad(curve(function, x), x)
    with plain_functions():
        found = function(x)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)
        loss = curve(function, x)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        # torch's gradient of hardsigmoid has a float32 sixth in float64 too
        tolerance = 1e-7 if name.startswith(("hardsigmoid", "modules")) else 1e-12
        torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=1e-14)
        direction = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6)
        (product,) = torch.autograd.grad(gradient, x, direction)
    step = 1e-6
    ends = [torch.autograd.grad(curve(function, y := x + sign * step * direction), y)[0] for sign in (1, -1)]
    torch.testing.assert_close(product, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [F.hardsigmoid, F.hardswish])
def test_hardsigmoid_and_hardswish_are_equal_bit_for_bit(function: Any, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([-3.0, 3.0, -0.0, torch.inf, -torch.inf])]).to(dtype)
    expected = function(x.clone())
    with plain_functions():
        assert torch.equal(function(x.clone()).nan_to_num(-9), expected.nan_to_num(-9))
        changed = x.clone()
        returned = function(changed, inplace=True)
        assert returned is changed and torch.equal(changed.nan_to_num(-9), expected.nan_to_num(-9))


def test_torch_is_restored_also_after_an_error() -> None:
    before = [getattr(*entry) for entry in ENTRIES]
    with pytest.raises(ZeroDivisionError), plain_functions():
        assert all(getattr(*entry) is not original for entry, original in zip(ENTRIES, before, strict=True))
        with plain_functions():
            F.hardsigmoid(torch.zeros(1))
        raise ZeroDivisionError
    assert [getattr(*entry) for entry in ENTRIES] == before


def test_other_arguments_go_to_torch() -> None:
    x, out = torch.linspace(-4, 4, 9), torch.empty(9)
    with plain_functions():
        assert torch._C._nn.hardsigmoid(x, out=out) is out
        weight = torch.ones(6, 2, requires_grad=True)
        F.embedding_bag(BAGS, weight, OFFSETS, scale_grad_by_freq=True, mode="sum").sum().backward()
        with pytest.raises(RuntimeError, match="hardsigmoid"):
            F.hardsigmoid(torch.arange(3))
    assert torch.equal(out, F.hardsigmoid(x))
    assert weight.grad is not None and weight.grad[2].tolist() == [1, 1]  # two occurrences, half of each


def test_labels_out_of_range_are_an_error() -> None:
    with plain_functions(), pytest.raises(ValueError, match="target: expected classes from 0 to 5"):
        F.multi_margin_loss(torch.zeros(1, 6), torch.tensor([6]))


def test_a_mobile_net_has_the_hessian_of_its_plain_form() -> None:
    from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

    torch.manual_seed(0)
    block = InvertedResidual(InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1.0), nn.BatchNorm2d)
    head = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    model, batch = nn.Sequential(block, head).double().eval(), torch.randn(6, 8, 2, 2).double()

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x * 3).square().mean()

    result = sharpness(model, loss_fn, [batch], num_eigenvalues=2, density=False, tolerance=1e-6, params=["1"])
    jacobian = batch.new_tensor(0)
    with torch.no_grad():
        features = block(batch * 3).flatten(1)
        features = torch.cat([features, torch.ones(6, 1).double()], dim=1)
        jacobian = 2 / 18 * features.T @ features
    expected = torch.linalg.eigvalsh(jacobian)[-1]
    assert result.eigenvalues[:2] == pytest.approx([float(expected)] * 2, rel=1e-6)
    whole = sharpness(model, loss_fn, [batch], num_eigenvalues=1, density=False, max_probes=8)
    assert whole.eigenvalues_converged and whole.certificate is not None and whole.certificate.is_second_derivative
