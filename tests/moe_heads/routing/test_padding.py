"""Masks of padded tokens for heads, layers and routers deep in a model."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from moe_heads import MoELayer, Routing, SparseMoE, collect_routing
from moe_heads.routers import NoisyTopKRouter
from moe_heads.routing.collection import RoutingCollection


class Encoder(nn.Module):
    """A token model: embedding, a layer of experts, a head of tokens, and a head of pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = MoELayer(8, num_experts=4, expert_width=6)
        self.tokens = SparseMoE(8, 3, num_experts=4, expert_width=6)
        self.pooled = SparseMoE(8, 3, num_experts=4, expert_width=6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layer(self.embed(x))
        return self.tokens(x), self.pooled(x[:, 0])


def batch() -> tuple[Tensor, Tensor, Tensor]:
    short = torch.randn(3, 5, 4)
    x = torch.cat([short, 100 * torch.randn(3, 4, 4)], 1)
    return short, x, torch.arange(9).expand(3, -1) < 5


def run(model: nn.Module, x: Tensor, mask: Tensor | None = None) -> tuple[tuple[Tensor, ...], RoutingCollection]:
    with collect_routing(model, mask=mask) as routing:
        return model(x), routing


def test_a_mask_reaches_layers_and_heads_of_tokens_and_spares_those_of_samples() -> None:
    model = Encoder().eval()
    short, x, mask = batch()
    expected, wanted = run(model, short)
    output, got = run(model, x, mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(got.aux_loss, wanted.aux_loss)
    assert {name: int(stats.num_rows) for name, stats in got.stats.items()} == {"layer": 15, "tokens": 15, "pooled": 3}
    for name, stats in wanted.stats.items():
        assert torch.equal(got.stats[name].counts, stats.counts)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rows_of_all_tokens_are_masked_too() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = SparseMoE(4, 3, num_experts=4)
            self.gate = NoisyTopKRouter(4, 4, k=2)

        def forward(self, x: Tensor) -> Tensor:
            self.gate(x.flatten(0, 1))
            return self.head(x.flatten(0, 1))

    _, x, mask = batch()
    model = Flat().eval()
    output, routing = run(model, x, mask)
    assert [int(stats.num_rows) for stats in routing.stats.values()] == [15, 15]
    assert not output[~mask.flatten()].any()


def test_padding_does_not_count_for_a_third_party_router() -> None:
    model = nn.Sequential(nn.Linear(4, 6))

    def adapter(module: nn.Module, args: object, output: Tensor) -> Routing:
        return Routing.from_probs(output.softmax(-1), output.topk(2).indices)

    _, x, mask = batch()
    with collect_routing(model, {"0": adapter}, mask=mask) as routing:
        model(x)
    with collect_routing(model, {"0": adapter}) as real:
        model(x[mask])
    assert torch.equal(routing.stats["head"].counts, real.stats["head"].counts)
    assert int(routing.stats["head"].num_nonfinite) == 0


def test_a_caller_that_passes_a_mask_keeps_it() -> None:
    head = SparseMoE(4, 3, num_experts=4).eval()
    _, x, mask = batch()
    own = torch.ones_like(mask)
    with collect_routing(head, mask=mask) as routing:
        head(x, mask=own)
    assert int(routing.stats["head"].num_rows) == 27


class Passes(nn.Module):
    """Passes its own mask on, by name or by place, which is None here."""

    def __init__(self, module: nn.Module, by_place: bool) -> None:
        super().__init__()
        self.module, self.by_place = module, by_place

    def forward(self, x: Tensor) -> object:
        return self.module(x.flatten(0, 1), 9, None) if self.by_place else self.module(x, mask=None)


def test_a_mask_without_an_effect_is_reported() -> None:
    torch.compiler.reset()
    model = Encoder().eval()
    _, x, mask = batch()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with pytest.warns(UserWarning, match="so the mask had no effect"), collect_routing(compiled, mask=mask):
        compiled(x)


def test_nan_in_the_padding_of_a_router_reaches_no_gradient() -> None:
    router = NoisyTopKRouter(4, 4, k=2, balance={"switch": 0.1})
    _, x, mask = batch()
    x[~mask] = float("nan")
    routing = router(x.flatten(0, 1), 9, mask=mask.flatten())
    (routing.aux_loss + routing.gates[mask.flatten()].sum()).backward()
    assert all(p.grad.isfinite().all() for p in router.gate.parameters())


@pytest.mark.parametrize("by_place", [False, True])
def test_a_caller_that_passes_no_mask_by_name_or_place_gets_it(by_place: bool) -> None:
    _, x, mask = batch()
    model = Passes(NoisyTopKRouter(4, 4, k=2) if by_place else SparseMoE(4, 3, num_experts=4), by_place).eval()
    with collect_routing(model, mask=mask) as routing:
        model(x)
    assert [int(stats.num_rows) for stats in routing.stats.values()] == [15]


def test_a_copy_inside_the_block_has_no_mask() -> None:
    model = Encoder().eval()
    short, x, mask = batch()
    with collect_routing(model, mask=mask):
        model(x)
        twin = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
    for other in (twin, loaded):
        torch.testing.assert_close(other(short), model(short))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_model_takes_the_mask(compiled: bool) -> None:
    torch.compiler.reset()
    model = Encoder().eval()
    short, x, mask = batch()
    expected = model(short)
    runs = torch.compile(model, backend="eager") if compiled else model
    with collect_routing(model, mask=mask):
        torch.testing.assert_close(runs(x), expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 8, dtype=torch.bool), r"mask: expected a mask of the tokens of 'layer', which got x of shape"),
        (torch.ones(3, 9), r"mask: expected bool of shape \(B, T\), True for real tokens, got torch.float32"),
        (torch.ones(27, dtype=torch.bool), r"mask: expected bool of shape \(B, T\)"),
        ("attention_mask", r"mask: expected bool of shape \(B, T\), .* got 'attention_mask'"),
    ],
)
def test_bad_masks_are_refused(mask: object, message: str) -> None:
    model = Encoder()
    with pytest.raises(ValueError, match=message), collect_routing(model, mask=mask):
        model(torch.randn(3, 9, 4))
    assert not any(module._forward_pre_hooks for module in model.modules())
