"""Third-party routers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import Routing, SparseMoE, collect_routing
from moe_heads.routing import adapted_routers


class ForeignRouter(nn.Module):
    """Returns scores and indices, as many libraries do."""

    def __init__(self, k: int = 2) -> None:
        super().__init__()
        self.gate, self.k = nn.Linear(4, 6), k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = self.gate(x).softmax(-1)
        return probs, probs.topk(self.k, dim=-1).indices


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = ForeignRouter()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.router(x)[0].sum(-1, keepdim=True)


def adapter(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Routing:
    return Routing.from_probs(*output)


@pytest.mark.parametrize("key", [ForeignRouter, "*.router", "0.router"])
def test_by_class_and_by_name(key: type[nn.Module] | str) -> None:
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(5, 4)
    with collect_routing(model, {key: adapter}) as collection:
        model(x)
    assert list(collection.routings) == (["0"] if key == "0.router" else ["0", "1"])
    probs, indices = model[0].router(x)
    routing = collection.routings["0"][0]
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(routing.weights, probs.gather(-1, indices))
    torch.testing.assert_close(routing.logits.softmax(-1), probs)
    assert collection.stats["0"].counts.sum() == 10


def test_beside_routers_of_ours_and_the_first_adapter_that_fits() -> None:
    model = nn.Sequential(Layer(), SparseMoE(4, 3, num_experts=4, expert_width=2))
    soft = {"0.router": lambda m, a, out: Routing.from_probs(out[0]), ForeignRouter: adapter}
    with collect_routing(model, soft) as collection:
        model(torch.randn(5, 4))
    assert set(collection.routings) == {"0", "1"}
    assert collection.routings["0"][0].soft


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ForeignRouter(), ForeignRouter()


@pytest.mark.parametrize("keys", [(ForeignRouter,), ("*first", "*second"), ("*second", "*first")])
def test_routers_that_share_an_owner_go_by_their_own_names(keys: tuple[Any, ...]) -> None:
    adapters = dict.fromkeys(keys, adapter)
    assert set(adapted_routers(Pair(), adapters)) == {"first", "second"}
    assert set(adapted_routers(nn.Sequential(Pair(), Layer()), {ForeignRouter: adapter})) == {
        "0.first",
        "0.second",
        "1",
    }


def test_no_two_routers_have_one_name() -> None:
    model = Pair()
    model.first.inner = ForeignRouter()  # the owner's name is that of a router
    found = adapted_routers(model, {"first.inner": adapter, ForeignRouter: adapter})
    assert len({module for module, _ in found.values()}) == len(found)
    assert found["first"][0] is model.first
    assert found["first.inner"][0] is model.first.inner


def test_a_router_beside_one_of_ours() -> None:
    model = nn.Module()
    model.head = SparseMoE(4, 3, num_experts=4, expert_width=2)
    model.head.other = ForeignRouter()
    with collect_routing(model, {ForeignRouter: adapter}) as collection:
        model.head(torch.randn(5, 4))
        model.head.other(torch.randn(5, 4))
    assert {name: len(passes) for name, passes in collection.routings.items()} == {"head": 1, "head.other": 1}


def test_an_error_names_the_router_whose_adapter_raised_it() -> None:
    def broken(module: nn.Module, args: tuple[Any, ...], output: Any) -> Routing:
        return Routing.from_probs(output["probs"])

    model = nn.Sequential(Layer())
    with pytest.raises(TypeError) as raised, collect_routing(model, {ForeignRouter: broken}) as collection:
        model(torch.randn(5, 4))
    assert not collection.routings["0"]
    assert raised.value.__notes__ == ["adapters: raised by the adapter of router '0', a ForeignRouter"]


def test_tokens_know_their_sample() -> None:
    x = torch.randn(2, 3, 4)
    with collect_routing(Layer(), {ForeignRouter: adapter}) as collection:
        pass
    layer = Layer()
    with collect_routing(layer, {ForeignRouter: adapter}) as collection:
        layer(x)
    routing = collection.routings["head"][0]
    assert routing.rows_per_sample == 3
    assert routing.probs.shape == (6, 6)


def test_a_probability_of_zero_is_no_row_without_finite_logits() -> None:
    routing = Routing.from_probs(torch.tensor([[1.0, 0.0]]), torch.tensor([[0]]))
    assert routing.valid.all()
    assert not Routing.from_probs(torch.tensor([[torch.nan, 0.0]])).valid.any()


def test_scores_that_do_not_sum_to_one_and_those_that_cannot_be() -> None:
    scores = torch.tensor([[0.9, 0.3], [2.0, torch.nan]])
    routing = Routing.from_probs(scores, torch.tensor([[0], [0]]))
    torch.testing.assert_close(routing.probs[0], torch.tensor([0.75, 0.25]))
    assert routing.weights[0] == 0.9
    assert routing.valid.tolist() == [True, False]
    weights = torch.tensor([[torch.nan], [0.5]])
    assert Routing.from_probs(torch.ones(2, 2), torch.tensor([[0], [0]]), weights).valid.tolist() == [False, True]
    with pytest.raises(ValueError, match=r"probs: expected numbers of at least 0, got -1\. Pass logits.softmax"):
        Routing.from_probs(torch.tensor([[0.9, 0.3], [2.0, -1.0]]))
    with pytest.raises(ValueError, match=r"weights: expected numbers of at least 0, got -0.5"):
        Routing.from_probs(torch.ones(2, 2), torch.tensor([[0], [0]]), torch.tensor([[0.5], [-0.5]]))


def test_rows_of_a_sample_can_be_told() -> None:
    assert Routing.from_probs(torch.ones(6, 2), rows_per_sample=3).rows_per_sample == 3
    with pytest.raises(ValueError, match="rows_per_sample: expected a divisor of the 6 rows, got 4"):
        Routing.from_probs(torch.ones(6, 2), rows_per_sample=4)


def test_paused_and_copied_models_record_nothing() -> None:
    model, x = nn.Sequential(Layer()), torch.randn(5, 4)
    with collect_routing(model, {ForeignRouter: adapter}) as collection:
        collection.paused = True
        model(x)
        collection.paused = False
        copy.deepcopy(model)(x)
        pickle.loads(pickle.dumps(model))(x)
        assert collection.routings["0"] == []
        model(x)
    assert len(collection.routings["0"]) == 1


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (
            {"nowhere": adapter},
            "adapters: expected classes or names of modules inside the model, got 'nowhere', .* names such as '0', ",
        ),
        ({int: adapter}, r"adapters: expected adapter\(module, args, output\) by a module class or a name"),
        ({ForeignRouter: None}, r"adapters: expected adapter\(module, args, output\)"),
        ({"1.router": adapter}, "expected modules that are not routers of moe_heads, got '1.router'"),
    ],
)
def test_adapters_that_cannot_be(adapters: dict[Any, Any], message: str) -> None:
    model = nn.Sequential(Layer(), SparseMoE(4, 3, num_experts=4))
    with pytest.raises(ValueError, match=message), collect_routing(model, adapters):
        pass


def test_an_adapter_that_gives_no_routing() -> None:
    model = nn.Sequential(Layer())
    with (
        pytest.raises(ValueError, match=r"adapters: expected a moe_heads.Routing of router '0', got tuple"),
        collect_routing(model, {ForeignRouter: lambda m, a, output: output}),
    ):
        model(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"probs: expected floating .* \(N, E\) or \(B, T, E\), got \(3,\)"),
        ((torch.ones(3, 2, dtype=torch.int64),), r"probs: expected .* \(N, E\)"),
        ((torch.ones(3, 2), torch.zeros(2, 1, dtype=torch.int64)), r"indices: expected integers of shape \(3,\)"),
        ((torch.ones(3, 2), torch.zeros(3, 1)), "indices: expected integers"),
        ((torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.bool)), "indices: expected integers"),
        ((torch.ones(3, 2), torch.zeros(3, 0, dtype=torch.int64)), "indices: expected integers"),
        (
            (torch.ones(3, 2), torch.full((3, 1), -2)),
            "indices: expected 0 to 1, or -1 or 2 for a choice",
        ),
        ((torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64)), "indices: expected every expert at most once per"),
        ((torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 2)), "weights: expected the shape"),
        ((torch.ones(3, 2), None, torch.ones(3, 2)), "weights: expected the shape of indices"),
    ],
)
def test_from_probs_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Routing.from_probs(*arguments)


def test_a_compiled_model_is_compiled_once_and_without_a_break() -> None:
    from torch._dynamo.utils import counters

    def graphs(watched: bool) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        model = nn.Sequential(nn.Linear(4, 4), SparseMoE(4, 3, num_experts=4, expert_width=2))
        compiled = torch.compile(model, backend="aot_eager")
        with collect_routing(model) as collection:
            collection.paused = not watched
            for _ in range(3):
                compiled(torch.randn(8, 4)).sum().backward()
            assert len(collection.routings["1"]) == (3 if watched else 0)
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    assert graphs(watched=True) == graphs(watched=False) == (1, 0)


def test_blocks_that_are_compiled_alone_share_their_graphs() -> None:
    from torch._dynamo.utils import counters

    def graphs(watched: bool) -> int:
        torch._dynamo.reset()
        counters.clear()
        blocks = nn.Sequential(*(SparseMoE(4, 4, num_experts=4, expert_width=2) for _ in range(12)))
        for block in blocks:
            block.compile(backend="aot_eager")
        with collect_routing(blocks) as collection:
            collection.paused = not watched
            x = torch.randn(8, 4)
            torch.stack([block(x) for block in blocks]).sum().backward()
        assert all(len(passes) == int(watched) for passes in collection.routings.values())
        return counters["stats"]["unique_graphs"]

    assert graphs(watched=True) == graphs(watched=False)
