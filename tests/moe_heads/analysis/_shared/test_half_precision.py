"""Analyses of models partly in half precision agree with float64 up to the rounding of half precision."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import SparseMoE
from moe_heads.analysis import analysis_mode, loss_landscape, perturbation_sharpness, sharpness
from moe_heads.analysis._shared.half_precision import computes_in_half
from moe_heads.analysis._shared.promotion import PromotedPrecision
from tests.support.untouched import untouched

HALF = [torch.bfloat16, torch.float16]


class Adapted(nn.Module):
    """A LoRA layer by hand: a half-precision weight and float32 adapters in one module."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=dtype) / 3, requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 8) / 3), nn.Parameter(torch.randn(8, 2) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight) + x @ self.a.T @ self.b.T).tanh()


class Wrapped(nn.Module):
    """A LoRA layer as peft has it, around a layer of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = frozen(nn.Linear(8, 8), dtype)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) + self.up(self.down(x))).tanh()


class Featured(nn.Module):
    """Uses its backbone by another method than forward, and one of its weights directly."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = frozen(nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)]), dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.linear(x.tanh(), self.layers[0].weight)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU], dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = frozen(kind(8, 8, batch_first=True), dtype)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x[:, None].repeat(1, 3, 1), [3] * len(x), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0][:, -1]


class Sequenced(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.stack([x, x.roll(1, 1), -x], 1)).mean(1)


def frozen(module: nn.Module, dtype: torch.dtype) -> Any:
    return module.to(dtype).requires_grad_(False)


def encoder(dtype: torch.dtype) -> nn.Module:
    return Sequenced(frozen(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), dtype))


BODIES: dict[str, Any] = {
    "layers": lambda dtype: frozen(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.BatchNorm1d(8)), dtype),
    "lora": Adapted,
    "peft": Wrapped,
    "behind what is trained": lambda d: nn.Sequential(nn.Linear(8, 8), frozen(nn.Linear(8, 8), d), nn.Tanh()),
    "transformer": encoder,
    "other methods": Featured,
    "lstm": lambda dtype: Recurrent(nn.LSTM, dtype),
    "gru": lambda dtype: Recurrent(nn.GRU, dtype),
    "buffers": lambda dtype: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False).to(dtype), nn.Tanh()),
    "norm with half buffers": lambda d: nn.Sequential(nn.Linear(8, 8), half_buffers(d), nn.Tanh()),
    "sparse head": lambda dtype: frozen(SparseMoE(8, 8, num_experts=4, dropout=0.0), dtype),
}


def half_buffers(dtype: torch.dtype) -> nn.Module:
    norm = nn.BatchNorm1d(8).to(dtype)
    norm.weight.data, norm.bias.data = torch.ones(8), torch.zeros(8)
    return norm


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("body", BODIES)
def test_all_analyses_give_what_float64_gives(body: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BODIES[body](dtype), nn.Linear(8, 3)).eval()
    x, y = torch.randn(30, 8), torch.randint(3, (30,))
    reference = copy.deepcopy(model).double()
    # float16 is computed in float32, and so are recurrent layers
    tolerance = 3e-3 if dtype == torch.bfloat16 else 1e-4
    options: dict[str, Any] = {"params": ["1"], "num_eigenvalues": 1, "density": False}
    with untouched(model):
        found = sharpness(model, cross_entropy, [(x, y)], **options)
        around = perturbation_sharpness(model, cross_entropy, [(x, y)], num_draws=2, num_steps=1)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        line = loss_landscape(model, cross_entropy, [(x, y)], direction1=torch.ones(size) * 0.01, num_points=3)
    expected = sharpness(reference, cross_entropy, [(x.double(), y)], **options)
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=tolerance)
    assert [around.center_loss, line.center_loss] == pytest.approx([found.center_loss] * 2, rel=1e-6)
    assert found.center_loss == pytest.approx(expected.center_loss, rel=tolerance)
    assert found.eigenvalues_converged


@pytest.mark.parametrize("dtype", HALF)
def test_embeddings_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, y = torch.randint(9, (30, 4)), torch.randint(3, (30,))
    model = nn.Sequential(frozen(nn.Embedding(9, 8), dtype), nn.LayerNorm(8), nn.Flatten(), nn.Linear(32, 3)).eval()
    reference = copy.deepcopy(model).double()
    found, expected = (
        sharpness(m, cross_entropy, [(tokens, y)], num_eigenvalues=1, density=False) for m in (model, reference)
    )
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-4)


def test_float16_does_not_underflow_where_gradients_are_small() -> None:
    torch.manual_seed(0)
    body = frozen(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), torch.float16)
    model = nn.Sequential(nn.Linear(8, 16), body, nn.Linear(16, 50))
    x, y = torch.randn(5000, 8), torch.randint(50, (5000,))
    options: dict[str, Any] = {"params": ["0"], "num_eigenvalues": 1, "density": False}
    found = sharpness(model, cross_entropy, [(x, y)], **options)
    expected = sharpness(copy.deepcopy(model).double(), cross_entropy, [(x.double(), y)], **options)
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-3)


def test_modules_are_as_they_were_also_after_an_error() -> None:
    model = nn.Sequential(
        frozen(nn.Linear(4, 4), torch.bfloat16), frozen(nn.LSTM(4, 4), torch.float16), nn.Linear(4, 1)
    )
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(KeyError), analysis_mode(model):
        assert model[0](torch.ones(1, 4)).dtype == model[1](torch.ones(1, 4))[0].dtype == torch.float32
        raise KeyError
    assert [{**vars(module), "training": True} for module in model.modules()] == before
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError):
        torch.ones(1, 4) @ model[0].weight


def test_a_model_that_is_all_in_half_precision_is_left_alone() -> None:
    model = nn.Linear(4, 4).bfloat16()
    with analysis_mode(model):
        assert model(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_computes_in_half() -> None:
    assert computes_in_half(nn.Linear(2, 2)) is None
    assert computes_in_half(nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2))) == torch.float16
    assert computes_in_half(nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2).bfloat16())) == torch.bfloat16


def test_an_error_of_types_names_the_remedy() -> None:
    model = nn.Sequential(frozen(nn.Linear(4, 4), torch.bfloat16), nn.Linear(4, 3))

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return torch.stack([torch.vdot(row, m[0].weight[0]) for row in batch]).mean()

    with pytest.raises(RuntimeError) as caught:
        perturbation_sharpness(model, loss, [torch.randn(5, 4)])
    assert any("analyze a copy in float32" in note for note in caught.value.__notes__)


def test_promotion_leaves_alone_what_torch_promotes_and_what_is_written_in_place() -> None:
    half, full = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    with PromotedPrecision():
        assert (half @ full).dtype == F.layer_norm(full, (2,), half[0], half[0]).dtype == torch.float32
        assert (half @ half).dtype == torch.bfloat16
        assert half.add_(full).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.linear(full, half).dtype == torch.bfloat16
