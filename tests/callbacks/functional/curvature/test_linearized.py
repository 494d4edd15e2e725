import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from moe_heads import Dense, SoftMoE, SparseMoE
from moe_heads.callbacks.functional.common.preserve import analysis_mode
from moe_heads.callbacks.functional.curvature.linearized import BoundGradient
from moe_heads.callbacks.functional.curvature.operator import HessianOperator
from moe_heads.callbacks.functional.curvature.partition import reuse_memory, split_by_inputs
from tests.support.head_zoo import ROUTERS, head_with
from tests.support.hessians import classification, cross_entropy, small_cnn, small_mlp

HEADS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: Dense(64, 3, width=8),
    "soft": lambda: SoftMoE(64, 3, num_experts=4, expert_width=8),
    "sparse": lambda: SparseMoE(64, 3, num_experts=4, expert_width=8),
}


def agree(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    with analysis_mode(model):
        traced = HessianOperator(model, cross_entropy, batches, mode="linearized")
        rebuilt = HessianOperator(model, cross_entropy, batches, mode="rebuilt")
        assert (traced.mode, rebuilt.mode, traced.reason) == ("linearized", "rebuilt", "")
        for _ in range(3):
            v = torch.randn(traced.num_parameters, dtype=torch.float64)
            torch.testing.assert_close(traced.matvec(v), rebuilt.matvec(v), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("head", HEADS)
def test_heads_on_a_backbone_with_batch_norm(head: str) -> None:
    backbone = small_cnn()
    model = nn.Sequential(*backbone[:5], HEADS[head]()).double()
    # the second batch of the first one's shape uses the same program, the last one has another shape
    agree(model, [classification(size, 1, 8, 8) for size in (10, 10, 7)])


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router(router: str) -> None:
    agree(head_with(router), [(torch.randn(12, 8).double(), torch.randint(0, 3, (12,))) for _ in range(2)])


def test_a_program_is_given_each_batch_anew() -> None:
    model, first, second = small_mlp(), classification(9, 5), classification(9, 5)
    both = HessianOperator(model, cross_entropy, [first, second], mode="linearized")
    v = torch.randn(57, dtype=torch.float64)
    alone = [HessianOperator(model, cross_entropy, [batch], mode="rebuilt").matvec(v) for batch in (first, second)]
    torch.testing.assert_close(both.matvec(v, 0), alone[0] / 2)
    torch.testing.assert_close(both.matvec(v, 1), alone[1] / 2)


def test_random_layers_are_not_traced_with_other_numbers() -> None:
    def noisy(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(F.dropout(m(batch[0]), 0.5, training=True), batch[1])

    model, batches = small_mlp(), [classification(10, 5) for _ in range(3)]
    operator = HessianOperator(model, noisy, batches, mode="linearized")
    v = torch.randn(57, dtype=torch.float64)
    assert (operator.mode, operator.reason) == ("kept", "the traced derivative gave another product")
    torch.testing.assert_close(operator.matvec(v), HessianOperator(model, noisy, batches, mode="rebuilt").matvec(v))


class Chooses(nn.Module):
    """What it computes depends on the values of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if float(x.sum()) > 0 else self.body(x) ** 2


def test_what_cannot_be_traced_is_differentiated_by_autograd() -> None:
    positive, negative = classification(6, 5), classification(6, 5)
    batches = [(positive[0].abs(), positive[1]), (-negative[0].abs(), negative[1])]
    model = Chooses()
    operator = HessianOperator(model, cross_entropy, batches, mode="linearized")
    assert operator.mode == "kept" and operator.reason
    v = torch.randn(57, dtype=torch.float64)
    torch.testing.assert_close(
        operator.matvec(v), HessianOperator(model, cross_entropy, batches, mode="rebuilt").matvec(v)
    )
    # a list beside the tensors cannot be given to a program
    labelled = [(*positive, ["a"] * 6)]
    assert HessianOperator(model, lambda m, b: cross_entropy(m, b[:2]), labelled, mode="linearized").mode == "kept"


def test_a_wrong_program_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(self: object, tangents: list[Tensor]) -> list[Tensor]:
        return [1.01 * row for row in real(self, tangents)]

    real = BoundGradient.__call__
    monkeypatch.setattr(BoundGradient, "__call__", scaled)
    operator = HessianOperator(small_mlp(), cross_entropy, [classification(6, 5)], mode="linearized")
    assert (operator.mode, operator.reason) == ("kept", "the traced derivative gave another product")


def test_pays_for_large_graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = copy.deepcopy(small_mlp()), [classification(6, 5)] * 2
    assert HessianOperator(model, cross_entropy, batches).mode == "kept"
    monkeypatch.setattr("moe_heads.callbacks.functional.curvature.products._TRACE_ABOVE", 1000)
    assert HessianOperator(model, cross_entropy, batches).mode == "linearized"


def test_cut_into_constant_and_dependent_parts() -> None:
    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        constant = (a.sin() * 2).view(2, 3)
        buffer = torch.zeros(3)  # constant, but written to by what depends on b
        buffer.add_(b)
        return [constant @ b, buffer * 2, constant.sum()]

    a, b = torch.randn(6), torch.randn(3)
    before, after = split_by_inputs(make_fx(function)(a, b), [1])
    calls = [str(node.target) for node in after.graph.nodes if node.op == "call_function"]
    assert not any("sin" in call for call in calls) and any("zeros" in call for call in calls)
    constants = before(a)
    for other in (b, torch.randn(3), torch.randn(3)):
        torch.testing.assert_close(after(*constants, other), function(a, other))


def test_overwrites_only_what_nobody_needs() -> None:
    def function(a: Tensor) -> list[Tensor]:
        first = a * 2
        view = first.view(-1)
        second = first + 1  # first is looked at again through its view
        third = second + view.view(2, 2)  # second can be overwritten
        fourth = a + third  # the input cannot, third can
        return [fourth * fourth, third.sum(0, keepdim=True) + torch.ones(2, 2)]  # the sum is smaller

    a = torch.randn(2, 2)
    program = make_fx(function)(a)
    expected, untouched = function(a), a.clone()
    reuse_memory(program)
    in_place = [node for node in program.graph.nodes if str(node.target).endswith("_.Tensor")]
    for _ in range(2):
        torch.testing.assert_close(program(a), expected)
    assert torch.equal(a, untouched) and len(in_place) >= 1
