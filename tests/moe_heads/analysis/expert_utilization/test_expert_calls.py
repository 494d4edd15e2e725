"""Experts of this package and experts that are modules, against a loop over rows and experts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe_heads import MoELayer, Routing, SoftMoE, SparseMoE
from moe_heads.analysis.expert_utilization.expert_calls import check_equal
from moe_heads.analysis.expert_utilization.expert_outputs import OutputNorms, OutputProbes
from moe_heads.analysis.expert_utilization.expert_weights import UnknownExpertsError
from tests.support.tiny_experts import SEPARATE, GateAndList, input_ids, routers_of, run


def norms_of(model: nn.Module, router: nn.Module, *args: Tensor, mask: Tensor | None = None) -> OutputNorms:
    """Norms of the outputs of 4 experts in a pass of the model."""
    probes = OutputProbes(model.eval(), {"router": router}, 1024)
    with torch.no_grad(), probes.listening({}):
        model(*args)
    num_rows = args[0].shape[:-1].numel()
    routing = replace(Routing.from_probs(torch.full((num_rows, 4), 0.25)), mask=mask)
    return probes.norms({"router": [routing]}, {})["router"]


@pytest.mark.parametrize("kind", [SparseMoE, SoftMoE, MoELayer])
@pytest.mark.parametrize("shape", [(9, 16), (3, 5, 16)])
def test_our_own_experts(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    head = kind(16, 3, num_experts=4, expert_width=8, dropout=0.5)
    x = torch.randn(shape)
    experts = head.experts
    expected = torch.zeros(4, dtype=torch.float64)
    head.requires_grad_(False)
    for row in x.flatten(0, -2):
        for e in range(4):
            hidden = experts.fc1.weight[e] @ row + experts.fc1.bias_by_expert[e]
            hidden = nn.functional.gelu(hidden) if kind is MoELayer else hidden.relu()
            expected[e] += float((experts.fc2.weight[e] @ hidden + experts.fc2.bias_by_expert[e]).norm())
    found = norms_of(head, head.router, x)
    assert found.totals is not None and found.num_rows == x.shape[:-1].numel() and not found.reason
    torch.testing.assert_close(found.totals, expected, rtol=1e-5, atol=0)


def test_list_of_experts() -> None:
    model, x = GateAndList(), torch.randn(12, 6)
    calls = []
    model.experts[1].register_forward_hook(lambda *_: calls.append(1))
    found = norms_of(model, model.gate, x)
    expected = torch.stack([torch.stack([module(row).norm() for row in x]).sum() for module in model.experts])
    assert found.totals is not None and found.num_rows == 12
    torch.testing.assert_close(found.totals, expected.detach().double(), rtol=1e-5, atol=0)
    # hooks of the user run in the pass of the model and in this loop, and not for the rows of the analysis
    assert len(calls) == 1 + 12


def test_padded_rows_are_left_out() -> None:
    model, x = GateAndList(), torch.randn(12, 6)
    mask = torch.arange(12) % 3 > 0
    found = norms_of(model, model.gate, x, mask=mask)
    expected = torch.stack([module(x[mask]).norm(dim=1).sum() for module in model.experts])
    assert found.totals is not None and found.num_rows == 8
    torch.testing.assert_close(found.totals, expected.detach().double(), rtol=1e-5, atol=0)
    assert norms_of(model, model.gate, x, mask=torch.zeros(12, dtype=torch.bool)).means is None


@pytest.mark.parametrize("name", SEPARATE)
def test_separate_experts_of_transformers(name: str) -> None:
    model, ids = SEPARATE[name](), input_ids()
    routers = routers_of(model)
    probes, given = OutputProbes(model, routers, 1024), dict[str, Tensor]()
    with torch.no_grad(), probes.listening({}):
        hooks = [
            router.register_forward_pre_hook(
                lambda module, args, path=path: given.update({path: args[0].flatten(0, -2)})
            )
            for path, router in routers.items()
        ]
        run(model, ids)
    for hook in hooks:
        hook.remove()
    routing = Routing.from_probs(torch.full((20, 4), 0.25))
    for path, found in probes.norms({key: [routing] for key in routers}, {}).items():
        experts = model.get_submodule(path.rpartition(".")[0]).experts
        assert found.totals is not None, found.reason
        for e in range(4):
            first, second = (m for m in experts[f"expert_{e}"].modules() if isinstance(m, nn.Linear))
            outputs = second(first(given[path]).relu())
            torch.testing.assert_close(found.totals[e], outputs.norm(dim=1).detach().double().sum(), rtol=1e-5, atol=0)


def test_experts_on_scaled_rows_are_unknown() -> None:
    model = GateAndList(scaled=True)
    found = norms_of(model, model.gate, torch.randn(12, 6))
    assert found.totals is None and "other rows than the router" in found.reason


class MeanExpert(nn.Linear):
    """Its output depends on the other rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - super().forward(x).mean(0)


class TwoArguments(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Caller(nn.Module):
    """Calls its experts in the way of a test, on all rows."""

    def __init__(self, kind: type[nn.Module], **kwargs: float) -> None:
        super().__init__()
        self.gate, self.kwargs = nn.Linear(6, 4), kwargs
        self.experts = nn.ModuleList(kind(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x)
        return sum(expert(x, **self.kwargs) for expert in self.experts)


def test_experts_that_cannot_run_alone_are_unknown() -> None:
    x = torch.randn(12, 6)
    model = Caller(MeanExpert)
    assert "do not give the outputs" in norms_of(model, model.gate, x).reason
    model = Caller(TwoArguments, scale=2.0)
    assert "more than rows" in norms_of(model, model.gate, x).reason
    model = Caller(nn.Linear)
    model.gate(x)
    probes = OutputProbes(model, {"router": model.gate}, 1024)
    with probes.listening({}):
        model.gate(x)
    (found,) = probes.norms({"router": [Routing.from_probs(torch.full((12, 4), 0.25))]}, {}).values()
    assert "no expert was called" in found.reason


def test_hooks_are_removed_after_an_error() -> None:
    model = Caller(nn.Linear)
    probes = OutputProbes(model, {"router": model.gate}, 1024)
    with pytest.raises(RuntimeError), probes.listening({}):
        model(torch.randn(2, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_equal_up_to_the_rounding_of_the_lowest_type() -> None:
    recorded = torch.randn(4, 6)
    check_equal(recorded * (1 + 1e-4), recorded)
    check_equal(recorded * 1.05, recorded, recorded.bfloat16())
    for other in (recorded * 1.01, recorded[:3], recorded * torch.nan):
        with pytest.raises(UnknownExpertsError):
            check_equal(other, recorded)
