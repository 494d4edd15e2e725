"""Fixed choices of the routers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_heads import Router, Routing, SoftMoE, SparseMoE, collect_routing, fixed_routing
from moe_heads.routers import BiasBalancedRouter, NoisyTopKRouter
from moe_heads.routing import RoutingCollection
from tests.support.hand_routers import HandModel
from tests.support.head_zoo import EXPERTS, FEATURES, ROUTERS, head_with
from tests.support.untouched import untouched


def with_router(router: Router) -> SparseMoE:
    sizes = {"num_experts": EXPERTS, "expert_width": 4, "num_shared_experts": 0}
    return SparseMoE(FEATURES, 3, **sizes, dropout=0.0, router=router).double().eval()


HEADS: dict[str, Callable[[], SparseMoE]] = {
    **{name: partial(head_with, name) for name in ROUTERS},
    "noisy_top_1": lambda: head_with("noisy_top_k", k=1),
    "bias_balanced_1": lambda: with_router(BiasBalancedRouter(FEATURES, EXPERTS, k=1)),
    "noisy_with_temperature": lambda: head_with("noisy_top_k", temperature=0.5, num_shared_experts=1),
}

# Gates of all experts by the definitions, from the logits and the places of the choices.
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "noisy_top_k": lambda z, chosen: z.exp() * chosen / (z.exp() * chosen).sum(-1, keepdim=True),
    "noisy_top_1": lambda z, chosen: z.softmax(-1) * chosen,
    "switch": lambda z, chosen: z.softmax(-1) * chosen,
    "bias_balanced": lambda z, chosen: z.sigmoid() * chosen / (z.sigmoid() * chosen).sum(-1, keepdim=True),
    "bias_balanced_1": lambda z, chosen: z.sigmoid() * chosen,
    "expert_choice": lambda z, chosen: z.softmax(-1) * chosen,
    "softmax": lambda z, chosen: z.softmax(-1),
}
GATES["noisy_with_temperature"] = GATES["normalized"] = GATES["noisy_top_k"]

every_head = pytest.mark.parametrize("name", list(HEADS))
features_or_tokens = pytest.mark.parametrize("shape", [(10, FEATURES), (4, 3, FEATURES)])


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def recorded(model: nn.Module, *xs: Tensor) -> RoutingCollection:
    with torch.no_grad(), collect_routing(model) as reference:
        for x in xs:
            model(x)
    return reference


def move(model: nn.Module) -> None:
    """Far enough that choices change."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))


def derivatives(head: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits, gradients and a Hessian-vector product of a loss."""
    parameters = [p for name, p in head.named_parameters() if "noise" not in name]
    logits = head(x)
    gradients = torch.autograd.grad(logits.square().sum().add(1).log(), parameters, create_graph=True)
    products = torch.autograd.grad(sum(g.sum() for g in gradients), parameters)
    return [logits, *gradients, *products]


@every_head
@features_or_tokens
@pytest.mark.parametrize("dispatch", ["auto", "all"])
def test_at_the_recorded_weights_nothing_changes_to_the_bit(name: str, shape: tuple[int, ...], dispatch: str) -> None:
    head, x = HEADS[name](), inputs(*shape)
    head.dispatch = dispatch
    free = derivatives(head, x)
    reference = recorded(head, x)
    with untouched(head), fixed_routing(head, reference):
        fixed = derivatives(head, x)
    for ours, theirs in zip(fixed, free, strict=True):
        assert torch.equal(ours, theirs)


@every_head
@pytest.mark.parametrize("training", [False, True])
def test_rechosen_with_the_choices_of_a_routing_itself_is_that_routing(name: str, training: bool) -> None:
    router = HEADS[name]().router.train(training)
    routing = router(inputs(12, FEATURES), 3)
    again = router.rechosen(routing, routing)
    assert torch.equal(again.gates, routing.gates)
    assert (again.logits, again.balance, again.rows_per_sample) == (routing.logits, routing.balance, 3)
    assert again.noisy_logits is routing.noisy_logits


@every_head
@features_or_tokens
def test_elsewhere_the_choices_are_the_recorded_ones_and_the_weights_those_of_now(
    name: str, shape: tuple[int, ...]
) -> None:
    head, x = HEADS[name](), inputs(*shape)
    reference = recorded(head, x)
    there = reference.routings["head"][0]
    move(head)
    free = head(x, return_routing=True)
    with fixed_routing(head, reference):
        fixed = head(x, return_routing=True)
    routing = fixed.routing
    assert torch.equal(routing.logits, free.routing.logits)
    if name == "softmax":
        assert torch.equal(fixed.logits, free.logits)
    else:
        assert torch.equal(routing.selected, there.selected)
        assert not torch.equal(free.routing.selected, there.selected)
        assert not torch.allclose(fixed.logits, free.logits)
    expected = GATES[name](routing.logits, there.selected)
    torch.testing.assert_close(routing.gates, expected)
    # and the head mixes with them: all experts by hand
    rows = x.reshape(-1, FEATURES)
    every = torch.stack([run_expert(head, e, rows) for e in range(EXPERTS)], 1)
    logits = (every * expected.unsqueeze(-1)).sum(1)
    if head.shared is not None:
        logits = logits + run_expert(head, 0, rows, shared=True)
    logits = logits if len(shape) == 2 else logits.view(*shape[:2], -1).mean(1)
    torch.testing.assert_close(fixed.logits, logits)


def run_expert(head: SparseMoE, expert: int, rows: Tensor, shared: bool = False) -> Tensor:
    experts = head.shared if shared else head.experts
    hidden = F.relu(F.linear(rows, experts.fc1.weight[expert], experts.fc1.bias_by_expert[expert]))
    return F.linear(hidden, experts.fc2.weight[expert], experts.fc2.bias_by_expert[expert])


@pytest.mark.parametrize("name", ["noisy_top_k", "noisy_top_1", "switch", "bias_balanced"])
def test_the_loss_is_smooth_where_two_experts_tie(name: str) -> None:
    """Every step across the tie changes the choice: finite differences agree with the derivatives at fixed choice."""
    head, x = HEADS[name](), inputs(1, FEATURES)
    gate = head.router.gate
    gate.weight.data.zero_()
    gate.bias.data.copy_(torch.tensor([1.0, 1.0, 1.0, 0.5]))
    reference = recorded(head, x)

    def logits(bias: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"router.gate.bias": bias}, (x,))

    def held(bias: Tensor) -> Tensor:
        with fixed_routing(head, reference):
            return logits(bias)

    bias = gate.bias.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(held, bias)
    assert torch.autograd.gradgradcheck(held, bias)
    assert not torch.autograd.gradcheck(logits, bias, raise_exception=False)


def test_several_heads_take_their_own_records() -> None:
    model = nn.ModuleDict({name: head_with(name) for name in ROUTERS})
    x = inputs(9, FEATURES)
    with torch.no_grad(), collect_routing(model) as reference:
        for head in model.values():
            head(x)
    move(model)
    with fixed_routing(model, reference), collect_routing(model) as now:
        for head in reversed(list(model.values())):
            head(x)
    for name in set(ROUTERS) - {"softmax"}:
        assert torch.equal(now.routings[name][0].selected, reference.routings[name][0].selected)


def test_several_passes_are_replayed_in_their_order() -> None:
    head = head_with("noisy_top_k")
    xs = [inputs(6, FEATURES), inputs(3, 2, FEATURES), inputs(6, FEATURES)]
    reference = recorded(head, *xs)
    move(head)
    with fixed_routing(head, reference):
        routings = [head(x, return_routing=True).routing for x in xs]
    for routing, there in zip(routings, reference.routings["head"], strict=True):
        assert torch.equal(routing.indices, there.indices)


def test_two_routers_of_one_module_are_kept_apart() -> None:
    class TwoRouters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coarse, self.fine = (NoisyTopKRouter(4, num_experts, k=1).eval() for num_experts in (3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.coarse(x).gates, self.fine(x).gates], -1)

    model = nn.Sequential(TwoRouters())
    x = torch.randn(20, 4)
    reference = recorded(model, x)
    before = model(x) > 0
    move(model)
    assert not torch.equal(model(x) > 0, before)
    with fixed_routing(model, reference):
        assert torch.equal(model(x) > 0, before)


@pytest.mark.parametrize("inside", [False, True])
def test_a_collection_sees_the_routing_that_was_used(inside: bool) -> None:
    head, x = head_with("switch"), inputs(30, FEATURES)
    reference = recorded(head, x)
    move(head)
    if inside:
        with fixed_routing(head, reference), collect_routing(head) as now:
            head(x)
    else:
        with collect_routing(head) as now, fixed_routing(head, reference):
            head(x)
    assert torch.equal(now.routings["head"][0].indices, reference.routings["head"][0].indices)


def test_of_two_nested_blocks_the_outer_one_decides() -> None:
    head, x = head_with("switch"), inputs(30, FEATURES)
    first = recorded(head, x)
    move(head)
    second = recorded(head, x)
    with fixed_routing(head, first), fixed_routing(head, second):
        routing = head(x, return_routing=True).routing
    assert torch.equal(routing.indices, first.routings["head"][0].indices)


def test_records_made_in_inference_mode_serve_with_a_gradient() -> None:
    head, x = head_with("noisy_top_k"), inputs(6, FEATURES)
    with torch.inference_mode():
        reference = recorded(head, x)
    expected = derivatives(head, x)
    with fixed_routing(head, reference):
        for ours, theirs in zip(derivatives(head, x), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_the_graph_of_the_records_is_not_used() -> None:
    head, x = head_with("noisy_top_k"), inputs(6, FEATURES)
    with collect_routing(head) as reference:
        head(x).sum().backward()  # frees it
    with fixed_routing(head, reference):
        head(x).sum().backward()
    assert reference.routings["head"][0].weights.requires_grad
    detached = reference.routings["head"][0].detach()
    assert torch.equal(detached.gates, reference.routings["head"][0].gates)
    assert not detached.gates.requires_grad
    assert detached.balance == head.router.balance


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("num_passes", [1, 3])
def test_gradient_checkpointing_replays_the_record_of_the_first_pass(use_reentrant: bool, num_passes: int) -> None:
    head = head_with("noisy_top_k")
    xs = [inputs(20, FEATURES).requires_grad_() for _ in range(num_passes)]
    reference = recorded(head, *xs)
    move(head)
    gradients = []
    for run in (head, lambda x: checkpoint(head, x, use_reentrant=use_reentrant)):
        head.zero_grad()
        with fixed_routing(head, reference):
            sum(run(x).square().sum() * (i + 1) for i, x in enumerate(xs)).backward()
        gradients.append(head.experts.fc2.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert (gradients[0] != 0).any()


def test_a_pass_in_backward_that_was_not_in_the_block_is_refused() -> None:
    head, x, other = head_with("noisy_top_k"), inputs(6, FEATURES), inputs(6, FEATURES)
    weight = torch.ones((), requires_grad=True)
    with fixed_routing(head, recorded(head, x, x)):
        loss = head(x).sum() + head(x).sum() * weight
        weight.register_hook(lambda gradient: head(other).sum().detach())
        with pytest.raises(ValueError, match="expected in backward the logits of one of the 2 passes of router 'head'"):
            loss.backward()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(7, FEATURES)], r"expected 6 rows .* as recorded in pass 1 of router '1', got 7 rows"),
        (
            [(3, 2, FEATURES)],
            r"6 rows \(1 per sample\), 4 experts, 2 chosen per row as .*, got 6 rows \(2 per sample\)",
        ),
        ([(6, FEATURES)] * 2, "expected 1 passes of router '1' as recorded, got one more"),
        ([], "expected 1 passes of router '1' as recorded, got 0. .* A model that was compiled"),
    ],
)
def test_other_passes_than_recorded_are_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    model = nn.Sequential(nn.Identity(), head_with("noisy_top_k"))
    reference = recorded(model, inputs(6, FEATURES))
    xs = [inputs(*shape) for shape in shapes]
    with untouched(model), pytest.raises(ValueError, match=message), fixed_routing(model, reference):
        for x in xs:
            model(x)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: head_with("switch"), "4 experts, 1 chosen per row .* got 6 rows .*, 4 experts, 2 chosen per row"),
        (lambda: head_with("softmax"), "4 experts, all run as .* got .* 2 chosen per row"),
        (lambda: head_with("expert_choice"), "4 experts, 3 rows chosen per expert .* got .* 2 chosen per row"),
        (lambda: head_with("noisy_top_k", num_experts=5), "5 experts, 2 chosen .* got 6 rows .*, 4 experts"),
        (
            lambda: nn.Sequential(head_with("noisy_top_k")),
            r"reference: expected passes of the model's routers \['head'\], got some of \['0'\]",
        ),
    ],
)
def test_records_of_another_model_are_refused(other: Callable[[], nn.Module], message: str) -> None:
    head, x = head_with("noisy_top_k"), inputs(6, FEATURES)
    reference = recorded(other(), x)
    with pytest.raises(ValueError, match=message), fixed_routing(head, reference):
        head(x)


def test_a_router_that_does_not_say_how_it_weights_is_refused_unless_it_is_soft() -> None:
    x = torch.randn(4, 3)
    sparse, soft = HandModel(3, k=2), HandModel(3)
    with (
        pytest.raises(ValueError, match=r"expected routers that define rechosen.*, got HandRouter"),
        fixed_routing(sparse, recorded(sparse, x)),
    ):
        sparse(x)
    with fixed_routing(soft, recorded(soft, x)):
        assert torch.equal(soft(x), x.softmax(-1))


def test_a_router_of_ones_own_that_says_how_serves() -> None:
    class Own(NoisyTopKRouter):
        """Weights without a softmax."""

        def rechosen(self, routing: Routing, reference: Routing) -> Routing:
            return Routing(routing.logits, routing.probs, reference.indices, 0 * routing.logits[:, :2] + 3.0)

    head = with_router(Own(FEATURES, EXPERTS, k=2))
    x = inputs(5, FEATURES)
    with fixed_routing(head, recorded(head, x)):
        assert head(x, return_routing=True).routing.gates.unique().tolist() == [0, 3]


def test_hooks_are_gone_after_an_error() -> None:
    model = nn.ModuleList([head_with("switch"), SoftMoE(FEATURES, 2).double()])
    x = inputs(4, FEATURES)
    with torch.no_grad(), collect_routing(model) as reference:
        model[0](x), model[1](x)
    # the error of the block is warned, not that passes are missing
    with pytest.raises(RuntimeError, match="stop"), fixed_routing(model, reference):
        model[0](x)
        raise RuntimeError("stop")
    assert all(not module._forward_hooks for module in model.modules())


def test_a_model_without_a_router_and_an_empty_collection() -> None:
    model = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    with fixed_routing(model, recorded(model, x)):
        assert torch.equal(model(x), F.linear(x, model.weight, model.bias))


def test_a_model_that_was_compiled_before_is_told() -> None:
    head = SparseMoE(4, 2, num_experts=4).eval()
    x = torch.randn(6, 4)
    reference = recorded(head, x)
    compiled = torch.compile(head, backend="eager")
    compiled(x)
    named = RoutingCollection()
    named.routings["_orig_mod"] = reference.routings["head"]
    with pytest.raises(ValueError, match="model that was compiled before"), fixed_routing(compiled, named):
        compiled(x)
