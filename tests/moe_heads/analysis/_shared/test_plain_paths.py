"""All analyses evaluate the function that training differentiates."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import analysis_mode, loss_landscape, perturbation_sharpness, sharpness
from moe_heads.analysis._shared.plain_paths import plain_paths


class Encoder(nn.Module):
    """A transformer with padding, whose fast path gives zeros at padded places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x), src_key_padding_mask=x == 0).mean(1))


def padded() -> tuple[Tensor, Tensor]:
    x = torch.randint(1, 20, (30, 12))
    x[torch.arange(12) >= torch.randint(2, 10, (30, 1))] = 0
    return x, torch.randint(3, (30,))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_fast_path_of_attention_is_off_in_all_analyses(frozen: bool) -> None:
    model, batch = Encoder().eval(), padded()
    model.encoder.requires_grad_(not frozen)
    direction = torch.randn(sum(p.numel() for p in model.parameters() if p.requires_grad)) * 0.01
    options: dict[str, Any] = {"params": ["head"], "num_eigenvalues": 1, "density": False}
    found = []
    try:
        for enabled in (False, True):
            torch.backends.mha.set_fastpath_enabled(enabled)
            spectrum = sharpness(model, cross_entropy, [batch], **options)
            line = loss_landscape(model, cross_entropy, [batch], direction1=direction, num_points=3)
            around = perturbation_sharpness(model, cross_entropy, [batch], num_draws=2, num_steps=1)
            centers = [spectrum.center_loss, line.center_loss, around.center_loss]
            found.append([spectrum.eigenvalues[0], float(line.losses[0]), around.average, around.worst, *centers])
            assert centers == pytest.approx([centers[0]] * 3, rel=1e-6)
            assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_all_flags_are_put_back_also_after_an_error() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(3, 2, sparse=True), "r": nn.GRU(2, 2), "b": nn.EmbeddingBag(3, 2)})
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(KeyError), plain_paths(model):
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not model["e"].sparse
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled()
    assert [dict(vars(module)) for module in model.modules()] == before


def test_recurrent_layers_run_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, x: seen.append(torch.backends.cudnn.enabled) or x)
    model = nn.Sequential(nn.LSTM(2, 2), nn.Identity())
    with analysis_mode(model):
        model(torch.ones(1, 2))
        assert torch.backends.cudnn.enabled
    model(torch.ones(1, 2))
    assert seen == [False, True]


@pytest.mark.gpu
def test_recurrent_layers_have_a_hessian_on_a_gpu() -> None:
    model, x = nn.LSTM(3, 4, batch_first=True), torch.randn(6, 5, 3)

    def loss(m: nn.Module, b: Tensor) -> Tensor:
        return m(b)[0].square().mean()

    options: dict[str, Any] = {"num_eigenvalues": 1, "density": False}
    expected = sharpness(model, loss, [x], **options)
    found = sharpness(model.cuda(), loss, [x.cuda()], **options)
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-3)


class Words(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding, self.head, self.kind = nn.Embedding(9, 4, sparse=kind == "module"), nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "function":
            return self.head(nn.functional.embedding(x, self.embedding.weight, sparse=True).mean(1))
        return self.head(self.embedding(x).mean(1))


@pytest.mark.parametrize("kind", ["module", "function"])
def test_sparse_gradients_give_what_dense_ones_give(kind: str) -> None:
    batch, dense = (torch.randint(9, (20, 5)), torch.randint(3, (20,))), Words("dense")
    sparse = Words(kind)
    sparse.load_state_dict(dense.state_dict())
    spectra = [sharpness(m, cross_entropy, [batch], num_eigenvalues=2, density=False) for m in (dense, sparse)]
    assert spectra[0].eigenvalues == pytest.approx(spectra[1].eigenvalues, rel=1e-5)
    around = [perturbation_sharpness(m, cross_entropy, [batch], num_draws=2, num_steps=2) for m in (dense, sparse)]
    assert around[0].metrics() == pytest.approx(around[1].metrics(), rel=1e-5)


class Lying(nn.Module):
    """Takes another path where no gradient is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x).tanh()
        return self.head(features if torch.is_grad_enabled() else features * (x <= 2).all(1, keepdim=True))


def test_a_path_without_gradients_is_not_taken_even_if_one_batch_alone_would() -> None:
    torch.manual_seed(0)
    x, y, model = torch.randn(20, 4).clamp(-1, 1), torch.randint(3, (20,)), Lying()
    x[15] = 3.0
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    loss = float(sum(cross_entropy(model, batch) for batch in batches).detach()) / 2
    line = loss_landscape(model, cross_entropy, batches, direction1=torch.ones(43), num_points=3)
    assert line.center_loss == pytest.approx(loss)
    around = perturbation_sharpness(model, cross_entropy, batches, num_draws=2, num_steps=1)
    assert around.center_loss == pytest.approx(loss)
    headed = loss_landscape(model, cross_entropy, batches, direction1=torch.ones(18), params=["head"], num_points=3)
    assert headed.center_loss == pytest.approx(loss)
    assert headed.reused == () and headed.not_reused == "the loss is evaluated with a graph"
