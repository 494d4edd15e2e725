import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from moe_heads import Dense, SoftMoE, SparseMoE
from moe_heads.callbacks.functional.common.preserve import analysis_mode
from moe_heads.callbacks.functional.curvature.linearized import BoundGradient, LinearizedGradient
from moe_heads.callbacks.functional.curvature.operator import HessianOperator
from moe_heads.callbacks.functional.curvature.partition import merge_equal, reuse_memory, split_by_inputs
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


@dataclass
class Boxed:
    x: Tensor
    y: Tensor


def test_batches_of_another_structure_are_not_given_to_the_program() -> None:
    model = small_mlp()
    x, y = classification(6, 5)

    def loss(m: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return cross_entropy(m, (batch["x"], batch["y"])) * (3 if "w" in batch else 1)
        if isinstance(batch, Boxed):
            return cross_entropy(m, (batch.x, batch.y)) * 5
        scale = 1.0 if batch[2] is None and batch[3] is not None else 2.0
        return cross_entropy(m, batch) * scale * (batch[4] if len(batch) > 4 else 1.0)

    extra = torch.ones(()).double()
    for batches in (
        [(x, y, None, extra), (x, y, extra, None)],
        [{"x": x, "y": y, "reg": extra}, {"x": x, "y": y, "w": extra}],
        [(x, y, None, extra), (x, y, None, extra, 7.0)],
        [(x, y, None, extra), [x, y, None, extra], Boxed(x, y)],
    ):
        traced = HessianOperator(model, loss, batches, mode="linearized")
        rebuilt = HessianOperator(model, loss, batches, mode="rebuilt")
        v = torch.randn(57, dtype=torch.float64)
        assert traced.mode == "linearized" and traced.num_kept == len(batches)
        torch.testing.assert_close(traced.matvec(v), rebuilt.matvec(v), rtol=1e-8, atol=1e-11)


def test_a_penalty_on_captured_parameters_is_not_lost() -> None:
    model = small_mlp()
    captured = list(model.parameters())

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(m, batch) + 1e-9 * sum(p.square().sum() for p in captured)

    operator = HessianOperator(model, loss, [classification(6, 5)], mode="linearized")
    assert operator.mode == "kept" and "other than through the modules" in operator.reason


def test_sizes_that_depend_on_values_are_not_traced() -> None:
    model = small_mlp()

    def masked(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        known = batch[0][:, 0] > 0
        return F.cross_entropy(m(batch[0])[known], batch[1][known])

    batches = [classification(20, 5) for _ in range(4)]
    operator = HessianOperator(model, masked, batches, mode="linearized")
    assert operator.mode == "kept" and "depends on the values in the batch" in operator.reason
    v = torch.randn(57, dtype=torch.float64)
    rebuilt = HessianOperator(model, masked, batches, mode="rebuilt")
    torch.testing.assert_close(operator.matvec(v), rebuilt.matvec(v))


@pytest.mark.parametrize("params", [["0"], ["2"], ["0", "4"]])
def test_some_parameters_also_below_frozen_ones(params: list[str]) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    batches = [classification(9, 5) for _ in range(2)]
    traced = HessianOperator(model, cross_entropy, batches, params=params, mode="linearized")
    rebuilt = HessianOperator(model, cross_entropy, batches, params=params, mode="rebuilt")
    assert traced.mode == "linearized" and traced.reason == ""
    for _ in range(2):
        v = torch.randn(traced.num_parameters, dtype=torch.float64)
        torch.testing.assert_close(traced.matvec(v), rebuilt.matvec(v), rtol=1e-8, atol=1e-11)


def test_what_a_program_keeps_is_counted() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3)).double()
    batches = [classification(64, 5) for _ in range(12)]
    whole = HessianOperator(model, cross_entropy, batches, mode="linearized")
    assert whole.num_kept == 12
    each = whole._products._kept[0].num_bytes
    some = HessianOperator(model, cross_entropy, batches, mode="linearized", graph_memory=5 * each)
    assert some.mode == "linearized" and some.num_kept == 5
    v = torch.randn(whole.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(some.matvec(v), whole.matvec(v))


def test_a_batch_that_the_program_does_not_fit_goes_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = LinearizedGradient.bind, 0

    def bind(self: LinearizedGradient, batch: Any) -> BoundGradient:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("does not fit")
        return real(self, batch)

    monkeypatch.setattr(LinearizedGradient, "bind", bind)
    model, batches = small_mlp(), [classification(6, 5) for _ in range(4)]
    operator = HessianOperator(model, cross_entropy, batches, mode="linearized")
    assert operator.num_kept == 4 and operator.reason == "batch 2: does not fit"
    v = torch.randn(57, dtype=torch.float64)
    rebuilt = HessianOperator(model, cross_entropy, batches, mode="rebuilt")
    torch.testing.assert_close(operator.matvec(v), rebuilt.matvec(v))


def test_equal_nodes_are_computed_once_unless_written_to_or_random() -> None:
    def function(a: Tensor) -> list[Tensor]:
        first, second = a.sin(), a.sin()
        third, fourth = a.cos(), a.cos()
        third.add_(1)
        return [first + second, third + fourth, torch.rand_like(a) - torch.rand_like(a)]

    a = torch.randn(3)
    program = make_fx(function)(a)
    merge_equal(program)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.sin.default") == 1 and targets.count("aten.cos.default") == 2
    found, expected = program(a), function(a)
    torch.testing.assert_close(found[:2], expected[:2])
    assert found[2].abs().min() > 0
