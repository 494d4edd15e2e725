import copy

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis.sharpness.hessian.folding import find_folds, folded
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.products import BatchProducts, GraphMode
from tests.support.hessians import classification, cross_entropy, small_cnn


class Net(nn.Module):
    """Everything that can be folded, and what cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, stride=2, padding="valid", groups=3), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 4, 2, dilation=2, bias=False), nn.BatchNorm2d(4, affine=False)
        self.linear, self.norm3 = nn.Linear(16, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).tanh()
        x = self.norm2(self.conv2(x)).tanh()
        return self.norm3(self.linear(x[:, :, :2, :2].flatten(1)))


def trained_statistics(model: nn.Module, *shape: int) -> nn.Module:
    model.train()
    model(3 * torch.randn(64, *shape) + 1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval().double()


def test_same_output_and_gradient() -> None:
    model, x = trained_statistics(Net(), 3, 12, 12), torch.randn(4, 3, 12, 12, dtype=torch.float64)
    folds = find_folds(model, lambda: model(x))
    assert [(f.layer, f.norm) for f in folds] == [
        (model.conv1, model.norm1),
        (model.conv2, model.norm2),
        (model.linear, model.norm3),
    ]
    params = list(model.parameters())
    plain = torch.autograd.grad(model(x).square().sum(), params)
    expected = model(x)
    with folded(folds):
        assert "forward" in vars(model.conv1)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), params), plain, rtol=1e-9, atol=1e-12)
    assert "forward" not in vars(model.conv1) and torch.equal(model(x), expected)


def test_undone_after_an_error() -> None:
    model = trained_statistics(small_cnn(), 1, 8, 8)
    folds = find_folds(model, lambda: model(torch.zeros(1, 1, 8, 8, dtype=torch.float64)))
    with pytest.raises(KeyError), folded(folds):
        raise KeyError
    assert len(folds) == 1 and all("forward" not in vars(m) for m in model.modules())


def changed(name: str) -> nn.Module:
    model = small_cnn().eval()
    conv, norm = model[0], model[1]
    if name == "training":
        norm.train()
    elif name == "hook on the norm":
        norm.register_forward_hook(lambda module, args, output: output * 2)
    elif name == "hook on the convolution":
        conv.register_forward_hook(lambda module, args, output: output * 2)
    elif name == "other padding":
        conv.padding_mode = "circular"
    elif name == "own forward":
        conv.forward = lambda x: conv._conv_forward(x, conv.weight, conv.bias) + 1
    elif name == "called twice":
        model.insert(1, nn.Sequential())
        model.append(nn.Sequential())
        return nn.Sequential(model, _Again(conv))
    elif name == "no statistics":
        norm.running_mean = norm.running_var = None
    elif name == "written to in between":
        model.insert(1, _AddInPlace())
    else:
        model.insert(1, nn.Identity())
        model[1].register_forward_hook(lambda module, args, output: output + 1)
    return model


class _Again(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.ones(1, 1, 8, 8)).mean()


class _AddInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


@pytest.mark.parametrize(
    "name",
    [
        "training",
        "hook on the norm",
        "hook on the convolution",
        "other padding",
        "own forward",
        "called twice",
        "no statistics",
        "written to in between",
        "something in between",
    ],
)
def test_left_alone(name: str) -> None:
    model = changed(name)
    assert find_folds(model, lambda: model(torch.randn(4, 1, 8, 8))) == []


class _UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small_cnn()

    def forward(self, x: Tensor) -> Tensor:
        between = self.body[0](x)
        return self.body[2:](self.body[1](between)) + between.mean((2, 3))[:, :3]


def test_a_fold_that_changes_the_function_is_found_out() -> None:
    model = _UsedTwice().eval().double()
    batch = classification(6, 1, 8, 8)
    assert len(find_folds(model, lambda: model(batch[0]))) == 1
    operator = HessianOperator(model, cross_entropy, [batch])
    plain = copy.deepcopy(model)
    plain.body[1].register_forward_hook(lambda module, args, output: None)
    v = torch.randn(operator.num_parameters, dtype=torch.float64)
    assert (operator.num_folded, operator.reason) == (0, "folded batch norms gave a different product")
    torch.testing.assert_close(operator.matvec(v), HessianOperator(plain, cross_entropy, [batch]).matvec(v))


class _FoldsSometimes(nn.Module):
    """Its batch norm runs for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_cnn()

    def forward(self, x: Tensor) -> Tensor:
        between = self.body[0](x)
        return self.body[2:](self.body[1](between) if float(x.mean()) > 0 else between)


@pytest.mark.parametrize("mode", ["kept", "rebuilt", None])
def test_a_fold_is_held_against_every_batch(mode: GraphMode | None) -> None:
    model = _FoldsSometimes().eval().double()
    x, y = classification(6, 1, 8, 8)
    batches = [(x.abs(), y), (-x.abs(), y)]
    operator = HessianOperator(model, cross_entropy, batches, mode=mode)
    plain = copy.deepcopy(model)
    plain.body[1].register_forward_hook(lambda module, args, output: None)
    v = torch.randn(operator.num_parameters, dtype=torch.float64)
    assert operator.num_folded == 0
    expected = HessianOperator(plain, cross_entropy, batches, mode="rebuilt").matvec(v)
    torch.testing.assert_close(operator.matvec(v), expected)


def test_a_fold_that_could_not_be_checked_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(products: BatchProducts, batch: object, folds: object) -> bool:
        raise torch.OutOfMemoryError("full")

    model, batch = _UsedTwice().eval().double(), classification(6, 1, 8, 8)
    expected = HessianOperator(model, cross_entropy, [batch], mode="rebuilt")
    monkeypatch.setattr(BatchProducts, "_is_same_product", full)
    operator = HessianOperator(model, cross_entropy, [batch])
    v = torch.randn(operator.num_parameters, dtype=torch.float64)
    assert (operator.num_folded, operator.reason) == (0, "memory ran out")
    torch.testing.assert_close(operator.matvec(v), expected.matvec(v))
