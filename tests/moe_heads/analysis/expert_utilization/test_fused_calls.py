"""Experts inside one module, against a loop over the weights of each expert."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_heads import Routing
from moe_heads.analysis.expert_utilization.expert_outputs import OutputNorms, OutputProbes
from moe_heads.analysis.expert_utilization.fused_calls import FusedExperts
from tests.support.tiny_experts import FUSED, input_ids, routers_of, run, swiglu_of


def norms_in(model: nn.Module, ids: Tensor, num_experts: int) -> tuple[dict[str, OutputNorms], dict[str, Tensor]]:
    """Norms of the outputs of all experts by router, and the input of the routers."""
    routers, given = routers_of(model), dict[str, Tensor]()
    probes = OutputProbes(model, routers, 1024)
    hooks = [
        router.register_forward_pre_hook(lambda module, args, path=path: given.update({path: args[0].flatten(0, -2)}))
        for path, router in routers.items()
    ]
    with torch.no_grad(), probes.listening({}):
        run(model, ids)
    for hook in hooks:
        hook.remove()
    routing = Routing.from_probs(torch.full((ids.numel(), num_experts), 1 / num_experts))
    return probes.norms({key: [routing] for key in routers}, {}), given


@pytest.mark.parametrize("name", FUSED)
def test_models_of_transformers(name: str) -> None:
    model, ids = FUSED[name](), input_ids()
    num_experts = 8 if name == "deepseek_v3" else 4
    found, given = norms_in(model, ids, num_experts)
    assert len(found) == (1 if name == "deepseek_v3" else 2)
    for path, norms in found.items():
        assert norms.totals is not None, norms.reason
        assert norms.num_rows == 20
        experts = model.get_submodule(path.rpartition(".")[0]).experts
        for e in range(num_experts):
            expected = swiglu_of(experts, e, given[path]).norm(dim=1).detach().double().sum()
            torch.testing.assert_close(norms.totals[e], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_half_precision_and_the_hooks_of_the_user(name: str) -> None:
    model, ids = FUSED[name](), input_ids()
    full, _ = norms_in(model, ids, 4)
    calls = []
    for module in model.modules():
        if "gate_up_proj" in dict(module.named_parameters(recurse=False)):
            module.register_forward_hook(lambda *_: calls.append(1))
    half, _ = norms_in(model.bfloat16(), ids, 4)
    assert len(calls) == 2  # one for each layer, in the pass of the model
    for path, norms in half.items():
        assert norms.totals is not None and full[path].totals is not None, norms.reason
        torch.testing.assert_close(norms.totals, full[path].totals, rtol=0.05, atol=0)


def test_scaling_the_second_matrix_scales_the_output() -> None:
    model, ids = FUSED["mixtral"](), input_ids()
    before, _ = norms_in(model, ids, 4)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    with torch.no_grad():
        experts.down_proj[2] *= 0.125
    after, _ = norms_in(model, ids, 4)
    of_first = "model.layers.0.mlp.gate"
    expected = before[of_first].totals
    assert expected is not None and after[of_first].totals is not None
    expected[2] *= 0.125
    torch.testing.assert_close(after[of_first].totals, expected)


class Block(nn.Module):
    """Linear gate and fused experts, called by a function of the test.

    Args:
        call: ``call(experts, x, index, weights)``, with indices and weights (N, 2).
        experts: The experts; by default E matrices.
    """

    def __init__(self, call: Callable[..., Tensor], experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 4), Matrices() if experts is None else experts
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).softmax(-1).topk(2)
        return self.call(self.experts, x, index, weights)


class Matrices(nn.Module):
    """E matrices, applied to the rows that choose them, with indices and weights in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: Tensor, first: Tensor, second: Tensor, power: int = 1) -> Tensor:
        index, weights = (first, second) if not first.is_floating_point() else (second, first)
        outputs = torch.einsum("nd,edo->neo", x, self.weight)
        gates = torch.zeros(len(x), 4, dtype=x.dtype).scatter_add(1, index.clamp(0, 3), weights * (index < 4))
        return torch.einsum("ne,neo->no", gates**power, outputs)


class ScaledInput(Matrices):
    """The mixing weight acts on the input of a layer that is not linear."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        gates = torch.zeros(len(x), 4).scatter(1, index, weights)
        return torch.einsum("nkd,kdo->no", gates.unsqueeze(-1) * x.unsqueeze(1), self.weight).relu()


def norms_of(model: Block, x: Tensor) -> OutputNorms:
    probes = OutputProbes(model, {"gate": model.gate}, 1024)
    with torch.no_grad(), probes.listening({}):
        model(x)
    return probes.norms({"gate": [Routing.from_probs(torch.full((len(x), 4), 0.25))]}, {})["gate"]


CALLS: dict[str, Callable[..., Tensor]] = {
    "positional": lambda experts, x, index, weights: experts(x, index, weights),
    "weights first": lambda experts, x, index, weights: experts(x, weights, index),
    "by name": lambda experts, x, index, weights: experts(x, second=weights, first=index, power=1),
    "dropped choices": lambda experts, x, index, weights: experts(x, index.masked_fill(weights < 0.3, 4), weights),
}


@pytest.mark.parametrize("call", CALLS)
def test_ways_of_calling(call: str) -> None:
    model, x = Block(CALLS[call]), torch.randn(9, 6)
    found = norms_of(model, x)
    assert found.totals is not None, found.reason
    expected = torch.stack([(x @ weight).norm(dim=1).sum() for weight in model.experts.weight])
    torch.testing.assert_close(found.totals, expected.detach().double(), rtol=1e-5, atol=0)


def doubled(experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return experts(torch.cat([x, x]), torch.cat([index, index]), torch.cat([weights, weights]))[: len(x)]


OTHER: dict[str, tuple[Block, str]] = {
    "squared weights": (Block(lambda e, x, index, weights: e(x, index, weights, power=2)), "do not give the outputs"),
    "weights on the input": (Block(lambda e, *args: e(*args), ScaledInput()), "do not give the outputs"),
    "other rows": (Block(doubled), "18 rows"),
    "not called": (Block(lambda e, x, *_: x), "no output"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_conventions_are_unknown(case: str) -> None:
    model, reason = OTHER[case]
    found = norms_of(model, torch.randn(9, 6))
    assert found.totals is None and reason in found.reason


class Blocks(nn.Module):
    """E matrices on the rows of each expert, expert by expert, as in Llama 4."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.view(4, -1, 6), self.weight).flatten(0, 1)


class BlockGate(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits.sigmoid(), logits


def in_blocks(experts: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    return experts((x.unsqueeze(0) * scores.T.unsqueeze(-1)).flatten(0, 1)).view(4, len(x), 6).sum(0)


def not_in_blocks(experts: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    return experts((x.unsqueeze(1) * scores.unsqueeze(-1)).flatten(0, 1))


class LlamaBlock(Block):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__(call, Blocks())
        self.gate = BlockGate(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.experts, x, self.gate(x)[0])


def test_rows_of_each_expert_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = LlamaBlock(in_blocks), torch.randn(9, 6)
    expected = torch.stack([(x @ weight).norm(dim=1).sum() for weight in model.experts.weight]).detach().double()
    for limit in (2**24, 2 * 4 * 6):  # the second limit is two rows at a time
        monkeypatch.setattr(sys.modules[FusedExperts.__module__], "_MAX_ELEMENTS", limit)
        found = norms_of(model, x)
        assert found.totals is not None, found.reason
        torch.testing.assert_close(found.totals, expected, rtol=1e-5, atol=0)


def test_rows_of_each_expert_in_another_order_are_unknown() -> None:
    assert "other rows than those of the router" in norms_of(LlamaBlock(not_in_blocks), torch.randn(9, 6)).reason
