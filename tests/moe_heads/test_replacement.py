"""Perceptrons inside models of other packages, replaced by mixtures of experts."""

import copy
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from moe_heads import Dense, MoELayer, collect_routing, replace_mlp
from moe_heads.routers import BiasBalancedRouter


def small_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5
    )


def test_every_second_perceptron_of_a_timm_vit() -> None:
    model = small_vit()
    assert replace_mlp(model, every=2, num_experts=4) == ("blocks.1.mlp", "blocks.3.mlp")
    layer = model.blocks[1].mlp
    assert isinstance(layer, MoELayer)
    assert (layer.in_features, layer.expert_width, layer.out_features) == (24, 96, 24)
    assert layer.experts.activation == "gelu"
    assert not isinstance(model.blocks[0].mlp, MoELayer)


def test_the_model_trains_with_all_balance_losses() -> None:
    torch.manual_seed(0)
    model = small_vit().train()
    replace_mlp(model, every=2, num_experts=4, expert_width=16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x, y = torch.randn(20, 3, 32, 32), torch.arange(20) % 5
    losses = []
    for _ in range(25):
        with collect_routing(model) as routing:
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss + routing.aux_loss).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert set(routing.stats) == {"blocks.1.mlp", "blocks.3.mlp"}
    assert losses[-1] < 0.5 * losses[0]


def test_the_model_exports_and_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    model = small_vit().eval()
    replace_mlp(model, every=1, num_experts=4, expert_width=16)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=[{0: batch}])
    torch.testing.assert_close(program.module()(x), expected)
    other = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(other), model(other))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("k", [2, 4])
def test_an_upcycled_model_starts_with_the_same_outputs(k: int) -> None:
    model = small_vit().eval()
    before = copy.deepcopy(model)
    replace_mlp(model, every=1, upcycle=True, num_experts=4, k=k)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)
    assert not model.blocks[0].mlp.training


def test_torchvision_and_other_containers() -> None:
    vit = torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=4)
    assert replace_mlp(vit, every=3) == ("encoder.layers.encoder_layer_2.mlp",)
    swin = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=4)
    names = replace_mlp(swin, every=1, num_experts=4)
    assert len(names) == 2
    assert swin(torch.randn(2, 3, 32, 32)).shape == (2, 4)


class Custom(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.act, self.drop = nn.Linear(8, 12, bias=bias), nn.SiLU(), nn.Dropout(0.3)
        self.down = nn.Linear(12, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(self.act(self.up(x))))


def test_a_perceptron_of_another_class_keeps_its_activation_dropout_dtype_and_mode() -> None:
    model = nn.ModuleDict({"block": nn.ModuleList([Custom(bias=False)])}).double().eval()
    before = copy.deepcopy(model["block"][0])
    assert replace_mlp(model, every=1, upcycle=True, num_experts=3, k=2) == ("block.0",)
    layer = model["block"][0]
    assert (layer.experts.activation, layer.experts.dropout, layer.training) == ("silu", 0.3, False)
    x = torch.randn(4, 8).double()
    torch.testing.assert_close(layer(x), before(x))


class Residual(Custom):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Block(nn.Module):
    """Consists of the parts of a perceptron, and adds its input."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Custom()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


def test_a_block_around_a_perceptron_keeps_its_residual_connection() -> None:
    model = nn.Sequential(Block())
    x = torch.randn(4, 8)
    expected = model.eval()(x)
    model.train()
    assert replace_mlp(model, every=1, upcycle=True, num_experts=2) == ("0.mlp",)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.eval()(x), expected)


def test_a_perceptron_used_twice_becomes_one_layer() -> None:
    model = nn.Module()
    model.a = model.b = Custom()
    model.c = Custom()
    assert replace_mlp(model, every=2) == ("c",)
    assert model.a is model.b and isinstance(model.a, Custom)
    assert replace_mlp(model, every=1) == ("a", "b")
    assert model.a is model.b and isinstance(model.a, MoELayer)


def test_dropout_after_the_second_layer_is_not_that_of_the_experts() -> None:
    mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Dropout(0.3))
    model = nn.Sequential(mlp)
    replace_mlp(model, every=1)
    assert model[0].experts.dropout == 0.0


def test_activations_of_other_classes_are_recognized_by_what_they_compute() -> None:
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3)
    assert len(replace_mlp(model, every=1, num_experts=2, expert_width=4)) == 4
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_every_layer_has_a_router_of_its_own() -> None:
    model = small_vit()
    names = replace_mlp(model, every=2, num_experts=4, router=BiasBalancedRouter)
    routers = [model.get_submodule(name).router for name in names]
    assert all(isinstance(router, BiasBalancedRouter) for router in routers) and routers[0] is not routers[1]
    with pytest.raises(ValueError, match="router: expected a function that builds a router for each layer"):
        replace_mlp(small_vit(), router=BiasBalancedRouter(24, 8))


class Counted(nn.Module):
    """A module without parameters whose calls leave a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + torch.rand(())


def test_modules_that_are_no_candidates_are_not_called() -> None:
    model = nn.Sequential(Counted(), Custom(), nn.Sequential(nn.Linear(8, 8), Counted()))
    replace_mlp(model, every=1)
    assert [module.calls for module in model.modules() if isinstance(module, Counted)] == [0, 0]


NO_PERCEPTRONS = {
    "residual": Residual(),
    "classifier": nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)),
    "gated": nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 12), nn.Linear(12, 8)),
    "normalized": nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8)),
    "approximate": nn.Sequential(nn.Linear(8, 12), nn.GELU(approximate="tanh"), nn.Linear(12, 8)),
    "tanh": nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)),
    "head": Dense(8, 8, width=12),
}


@pytest.mark.parametrize("name", list(NO_PERCEPTRONS))
def test_other_modules_are_left_alone(name: str) -> None:
    model = nn.Sequential(copy.deepcopy(NO_PERCEPTRONS[name]))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"every: expected at most the number of perceptrons in the model, 0, got 1"):
        replace_mlp(model, every=1)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 5}, r"every: expected at most the number of perceptrons in the model, 4, got 5"),
        ({"every": 0}, "every: expected an integer of at least 1, got 0"),
        ({"upcycle": 1}, "upcycle: expected True or False, got 1"),
        ({"in_features": 3}, "in_features: expected no value, since the perceptron sets it, got 3"),
        ({"upcycle": True, "expert_width": 3}, "expert_width: expected no value"),
        ({"k": 99}, "k: expected at most num_experts"),
    ],
)
def test_bad_arguments_change_nothing(options: dict[str, object], message: str) -> None:
    model = small_vit()
    with pytest.raises(ValueError, match=message):
        replace_mlp(model, **options)
    assert not any(isinstance(module, MoELayer) for module in model.modules())


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Custom())
    with pytest.raises(ValueError, match="model: expected parameters with values"):
        replace_mlp(model, every=1)


def test_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_mlp(small_vit())
