"""Routers of other packages than transformers: installed ones, and imitations of conventions."""

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soft_moe_pytorch import SoftMoE as SlotLayer
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import Routing, collect_routing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of beartype, about the annotations of the package
    from st_moe_pytorch import MoE as CapacityLayer


@pytest.mark.parametrize("training", [False, True])
def test_st_moe_pytorch(training: bool) -> None:
    torch.manual_seed(0)
    layer = CapacityLayer(dim=16, num_experts=4, gating_top_n=2, capacity_factor_eval=1.0, capacity_factor_train=0.6)
    layer.train(training)
    given: list[Tensor] = []
    layer.gate.register_forward_hook(lambda m, args, output: given.append(output[0].detach()))
    with collect_routing(layer) as collection, torch.no_grad():
        layer(torch.randn(3, 12, 16))
    stats, dispatch = collection.stats["head"], given[0]
    counts = [sum(bool(dispatch[b, t, e].any()) for b in range(3) for t in range(12)) for e in range(4)]
    assert stats.counts.tolist() == counts and int(stats.num_rows) == 36
    assert int(stats.num_dropped_choices) == 72 - sum(counts) > 0
    assert int(stats.num_dropped) == sum(not dispatch[b, t].any() for b in range(3) for t in range(12))
    assert 0 < stats.entropy < math.log(4) and stats.margin > 0
    assert collection.routings["head"][0].rows_per_sample == 12 and not collection.unrecognized


@pytest.mark.parametrize("shape", [(3, 10, 16), (5, 16), (2, 16, 3, 4)])
def test_soft_moe_pytorch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = SlotLayer(dim=16, num_experts=4, num_slots=3), torch.randn(shape)
    with collect_routing(layer) as collection, torch.no_grad():
        layer(x)
    routing = collection.routings["head"][0]
    rows = x.flatten(2).transpose(1, 2).reshape(-1, 16) if len(shape) == 4 else x.reshape(-1, 16)
    # the weight of an expert's output: what its output adds if all others are silent
    for expert in range(4):
        for other in range(4):
            for parameter in layer.experts.experts[other].parameters():
                nn.init.zeros_(parameter)
        layer.experts.experts[expert][-1].bias.data.fill_(1.0)
        with torch.no_grad():
            shares = layer(x)
        shares = shares.flatten(2).transpose(1, 2).reshape(-1, 16) if len(shape) == 4 else shares.reshape(-1, 16)
        torch.testing.assert_close(routing.gates[:, expert], shares[:, 0])
    assert routing.soft and len(routing.gates) == len(rows)


def test_soft_moe_pytorch_with_padding_and_with_noise() -> None:
    layer, x = SlotLayer(dim=16, num_experts=4, num_slots=3), torch.randn(3, 10, 16)
    mask = torch.arange(10) < torch.tensor([[10], [4], [7]])
    with collect_routing(layer) as collection:
        layer(x, mask=mask)
        layer(x[1:2, :4])
    padded, alone = collection.routings["head"]
    assert int(padded.stats().num_rows) == 21
    torch.testing.assert_close(padded.gates[10:14], alone.gates)
    with collect_routing(layer) as collection:
        layer(x, add_noise=True)
    assert "add_noise" in str(collection.errors["head"]) and not collection.stats


class Expert(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))


class MoE(nn.Module):
    """A layer with noisy gating in the manner of the first public port: the gate is a parameter of the layer."""

    def __init__(self, width: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.num_experts, self.k, self.noisy_gating = num_experts, k, True
        self.experts = nn.ModuleList(Expert(width) for _ in range(num_experts))
        self.w_gate = nn.Parameter(torch.randn(width, num_experts))
        self.w_noise = nn.Parameter(torch.randn(width, num_experts))
        self.softplus, self.softmax = nn.Softplus(), nn.Softmax(1)
        self.gates = torch.empty(0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.w_gate
        if self.noisy_gating and self.training:
            logits = logits + torch.randn_like(logits) * (self.softplus(x @ self.w_noise) + 1e-2)
        probs = self.softmax(logits)
        top, indices = probs.topk(self.k, dim=1)
        gates = torch.zeros_like(probs).scatter(1, indices, top / (top.sum(1, keepdim=True) + 1e-6))
        self.gates = gates.detach()
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (gates.unsqueeze(-1) * outputs).sum(1), gates.sum(0).var()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("at_root", [False, True])
def test_noisy_gating_of_a_parameter(training: bool, at_root: bool) -> None:
    layer = MoE(12, 5, k=2).train(training)
    model = layer if at_root else nn.Sequential(nn.Linear(12, 12), layer)
    with collect_routing(model) as collection:
        model(torch.randn(40, 12))
    (stats,) = collection.stats.values()
    assert stats.counts.tolist() == [int((layer.gates[:, e] > 0).sum()) for e in range(5)]
    torch.testing.assert_close(stats.gate_sum, layer.gates.double().sum(0), rtol=1e-4, atol=1e-4)
    assert stats.margin >= 0 and not collection.unrecognized


class TokenChoiceTopKRouter(nn.Module):
    """Weights, choices, and the number of tokens of each expert or a map of the choices."""

    def __init__(
        self, width: int, num_experts: int, top_k: int, score_func: str, groups: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.num_experts, self.top_k, self.score_func = num_experts, top_k, score_func
        self.num_expert_groups = None if groups is None else groups[0]
        self.num_limited_groups = None if groups is None else groups[1]

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x)
        scores = logits.sigmoid() if self.score_func == "sigmoid" else logits.softmax(-1)
        compared = scores if expert_bias is None else scores + expert_bias
        if self.num_expert_groups is not None:
            grouped = compared.view(len(x), self.num_expert_groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.num_limited_groups, dim=-1).indices
            allowed = torch.zeros(len(x), self.num_expert_groups).scatter(1, best, 1.0).bool()
            compared = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
        chosen = compared.topk(self.top_k, dim=-1, sorted=False).indices
        return scores.gather(1, chosen), chosen, torch.bincount(chosen.flatten(), minlength=self.num_experts)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["softmax", "sigmoid"]), st.sampled_from([None, (4, 2), (2, 1)]), st.booleans(), st.integers(1, 3)
)
def test_token_choice(score_func: str, groups: tuple[int, int] | None, biased: bool, k: int) -> None:
    router, x = TokenChoiceTopKRouter(6, 8, k, score_func, groups), torch.randn(30, 6)
    bias = torch.randn(8) if biased else None
    with collect_routing(nn.Sequential(router)) as collection:
        _, chosen, counts = router(x, bias)
    (routing,) = collection.routings["head"]
    assert routing.stats().counts.tolist() == counts.tolist()
    assert (routing.margin >= 0).all()
    # the closest other choice among the experts of the groups of a row, by a loop
    logits = router.gate(x).detach()
    scores = (logits.sigmoid() if score_func == "sigmoid" else logits.softmax(-1)) + (0 if bias is None else bias)
    for row in range(len(x)):
        taken = set(chosen[row].tolist())
        others = [float(scores[row, e]) for e in range(8) if e not in taken]
        lowest = min(float(scores[row, e]) for e in taken)
        if groups is None:
            assert float(routing.margin[row]) == pytest.approx(lowest - max(others), abs=1e-5)
        else:
            assert float(routing.margin[row]) >= lowest - max(others) - 1e-5


class LinearTopKGate(nn.Module):
    def __init__(self, width: int, num_experts: int, k: int, capacity_factor: float) -> None:
        super().__init__()
        self.wg, self.top_k = nn.Linear(width, num_experts, bias=False), k
        self.capacity_factor, self.gate_noise = capacity_factor, 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.wg(x)


class MOELayer(nn.Module):
    """A gate that returns logits; the layer takes the choices and drops those beyond a capacity."""

    def __init__(self, width: int, num_experts: int, k: int, capacity_factor: float) -> None:
        super().__init__()
        self.gates = nn.ModuleList([LinearTopKGate(width, num_experts, k, capacity_factor)])
        self.experts = nn.ModuleList(Expert(width) for _ in range(num_experts))
        self.kept: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gates[0]
        probs = F.softmax(gate(x), dim=1)
        indices = probs.topk(gate.top_k, dim=1).indices
        num_experts = len(self.experts)
        capacity = gate.top_k * int(gate.capacity_factor * math.ceil(len(x) / num_experts))
        capacity = capacity if gate.capacity_factor else len(x)
        taken, self.kept = [0] * num_experts, [0] * num_experts
        for rank in range(gate.top_k):
            for row in range(len(x)):
                expert = int(indices[row, rank])
                self.kept[expert] += taken[expert] < capacity
                taken[expert] += 1
        return x


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0, 1.25]), st.integers(1, 60))
def test_a_gate_of_logits_with_a_capacity(k: int, factor: float, num_rows: int) -> None:
    layer = MOELayer(6, 4, k, factor)
    with collect_routing(layer) as collection:
        layer(torch.randn(num_rows, 6))
    (stats,) = collection.stats.values()
    assert stats.counts.tolist() == layer.kept
    assert int(stats.num_dropped_choices) == num_rows * k - sum(layer.kept)


def test_a_gate_whose_noise_cannot_be_seen() -> None:
    layer = MOELayer(6, 4, 2, 1.0).train()
    layer.gates[0].gate_noise = 1.0
    with collect_routing(layer) as collection:
        layer(torch.randn(20, 6))
    assert "gate_noise" in str(collection.errors["gates"]) and not collection.stats
    layer.eval()
    with collect_routing(layer) as collection:
        layer(torch.randn(20, 6))
    assert collection.stats


class Gate(nn.Module):
    """A gate of a user: what it returns is made by a function."""

    def __init__(self, form: Any, **attributes: Any) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(6, 5), form
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        logits = self.linear(x)
        weights, indices = logits.softmax(-1).topk(2, dim=-1)
        return self.form(logits, weights, indices)


class Layer(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(Expert(6) for _ in range(5))

    def forward(self, x: Tensor) -> Any:
        return self.gate(x)


FORMS = {
    "logits first": (lambda z, w, i: (z, w, i), {}),
    "choices first": (lambda z, w, i: (i, w), {"n_routed_experts": 5}),
    "counts": (lambda z, w, i: (w, i.int(), torch.bincount(i.flatten(), minlength=5)), {}),
    "map": (lambda z, w, i: (w, i, torch.zeros_like(z, dtype=torch.bool).scatter(-1, i, True)), {}),
    "tokens": (lambda z, w, i: (z.view(4, 5, 5), w.view(4, 5, 2), i.view(4, 5, 2)), {}),
    "dropped, -1": (lambda z, w, i: (z, w, torch.where(i == 3, -1, i)), {}),
    "dropped, -100": (lambda z, w, i: (z, w, torch.where(i == 3, -100, i)), {}),
    "weights of zero": (lambda z, w, i: (torch.where(i == 3, 0.0, w), torch.where(i == 3, i, i)), {"num_experts": 5}),
    "two weights": (lambda z, w, i: (w, i, 2 * w), {"num_experts": 5}),
    "as wide as the input": (lambda z, w, i: (w, i, torch.cat([z, z[:, :1]], -1)), {"n_experts": 5}),
    "one number a row": (lambda z, w, i: (w, i, z.logsumexp(-1)), {"num_experts": 5}),
    "dropped, E": (lambda z, w, i: (z, w, torch.where(i == 3, 5, i)), {}),
}


@pytest.mark.parametrize("name", FORMS)
def test_by_shape_alone(name: str) -> None:
    form, attributes = FORMS[name]
    model = nn.Sequential(Layer(Gate(form, **attributes)))
    with collect_routing(model) as collection:
        output = model(torch.randn(20, 6))
    stats = collection.stats["0"]
    indices = next(t for t in output if not t.is_floating_point() and t.dtype != torch.bool and t.dim() > 1)
    rows = indices.flatten(0, -2).tolist()
    gone = {-1, 5, -100} | ({3} if name == "weights of zero" else set())
    assert stats.counts.tolist() == [sum(row.count(e) for row in rows) if e not in gone else 0 for e in range(5)]
    assert int(stats.num_dropped_choices) == sum(e in gone for row in rows for e in row)
    assert int(stats.num_dropped) == sum(all(e in gone for e in row) for row in rows)
    assert stats.entropy.isnan() and stats.margin.isnan() and stats.importance.isfinite().all()
    assert collection.routings["0"][0].rows_per_sample == (5 if name == "tokens" else 1)
    assert not collection.unrecognized


@pytest.mark.parametrize(
    "form",
    [
        lambda z, w, i: z,
        lambda z, w, i: (z, w),
        lambda z, w, i: (w, i),
        lambda z, w, i: (z, w, i + 100),
        lambda z, w, i: (z, w, torch.zeros_like(i)),
        lambda z, w, i: {"logits": z},
        lambda z, w, i: (w, i, z.logsumexp(-1)),  # the number of experts is nowhere
    ],
)
def test_what_is_no_router_is_named(form: Any) -> None:
    model = nn.ModuleDict({"block": Layer(Gate(form)), "plain": nn.Linear(6, 6)})
    with collect_routing(model) as collection:
        model["block"](torch.randn(20, 6))
    assert not collection.routings and not collection.errors
    assert list(collection.unrecognized) == ["block"]


def test_one_wrong_row_and_negative_weights() -> None:
    model = nn.Sequential(Layer(Gate(lambda z, w, i: (z, w, torch.cat([i[:1, :1].expand(1, 2), i[1:]])))))
    with collect_routing(model) as collection:
        model(torch.randn(20, 6))
    stats = collection.stats["0"]
    assert int(stats.num_nonfinite) == 1 and int(stats.num_rows) == 19 and not collection.unrecognized

    logits = nn.Sequential(Layer(Gate(lambda z, w, i: (z.gather(-1, i) - 5, i), num_experts=5)))
    with collect_routing(logits) as collection:
        logits(torch.randn(20, 6))
        assert "its weights are negative" in collection.misfits["0"]
    torch.testing.assert_close(collection.stats["0"].importance, collection.stats["0"].load)


def test_what_only_looks_like_a_mixture_of_experts() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    with collect_routing(Ensemble()) as collection:
        assert not collection.unrecognized

    class FeatureRouter(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, x.long(), 2 * x

    router = FeatureRouter()
    with collect_routing(nn.Sequential(router)) as collection:
        router(torch.randn(4, 6))
    assert not collection.routings and not collection.errors and not collection.unrecognized


def test_an_adapter_of_an_outer_gate_leaves_inner_routers() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(6, 2)
            self.experts = nn.ModuleList(Layer(Gate(FORMS["logits first"][0])) for _ in range(2))

    model = Outer()
    with collect_routing(
        model, {"gate": lambda m, a, z: Routing.from_probs(z.softmax(-1), z.topk(1).indices)}
    ) as found:
        x = torch.randn(9, 6)
        model.gate(x)
        model.experts[1](x)
    assert set(found.stats) == {"head", "experts.1"}


def test_an_adapter_comes_before_the_registry_and_its_layer_is_known() -> None:
    def adapter(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Routing:
        return Routing.from_probs(logits.softmax(-1), logits.topk(2).indices)

    layer = Layer(nn.Linear(6, 5))
    with collect_routing(layer) as collection:
        layer(torch.randn(20, 6))
    assert list(collection.unrecognized) == [""]
    with collect_routing(layer, {"gate": adapter}) as collection:
        layer(torch.randn(20, 6))
    assert not collection.unrecognized and collection.stats["head"].counts.sum() == 40

    own = Layer(Gate(FORMS["logits first"][0]))
    with collect_routing(own, {Gate: lambda m, a, out: Routing.from_choices(out[2][:, :1], 5)}) as collection:
        own(torch.randn(20, 6))
    assert collection.stats["head"].counts.sum() == 20


def test_a_router_with_several_calls_in_a_pass() -> None:
    model = nn.Sequential(Layer(Gate(FORMS["logits first"][0])))
    with collect_routing(model) as collection:
        for size in (20, 7):
            model(torch.randn(size, 6))
    assert len(collection.routings["0"]) == 2 and int(collection.stats["0"].num_rows) == 27
