"""A balance loss that is missing in the training loss is reported once."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_heads import MoELayer, SoftMoE, SparseMoE, collect_routing
from moe_heads.routers import BiasBalancedRouter, ExpertChoiceRouter, SwitchRouter
from moe_heads.routing import LossWatch

MANY = 310

HEADS: dict[str, Callable[[], nn.Module]] = {
    "sparse": lambda: SparseMoE(4, 3, num_experts=4, expert_width=2),
    "soft": lambda: SoftMoE(4, 3, num_experts=4, expert_width=2),
    "switch": lambda: SparseMoE(4, 3, num_experts=4, expert_width=2, router=SwitchRouter(4, 4)),
    "layer": lambda: MoELayer(4, 3, num_experts=4, expert_width=2),
}


def messages(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


def train(model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], passes: int = MANY) -> list[str]:
    def run() -> None:
        for _ in range(passes):
            loss(model, torch.randn(6, 4), torch.randint(3, (6,))).backward()

    return messages(run)


def forgotten(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def returned_but_unused(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x, return_routing=True)[0], y)


def collected(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with collect_routing(model) as routing:
        loss = F.cross_entropy(model(x), y)
    return loss + routing.aux_loss


def added(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits, aux_loss, _ = model(x, return_routing=True)
    return F.cross_entropy(logits, y) + aux_loss


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("loss", [forgotten, returned_but_unused])
def test_a_forgotten_loss_is_reported_once_by_name(name: str, loss: Callable[..., Tensor]) -> None:
    model = HEADS[name]().train()
    (message,) = train(model, loss)
    assert message.startswith(f"{type(model.router).__name__} of 4 features and 4 experts: the balance loss got no")
    assert "300 training passes" in message and "return_routing=True" in message
    assert train(model, loss) == []


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("loss", [added, collected])
def test_an_added_loss_is_not_reported(name: str, loss: Callable[..., Tensor]) -> None:
    assert train(HEADS[name]().train(), loss) == []


def test_a_loss_added_now_and_then_is_not_reported() -> None:
    number = iter(range(10_000))

    def sometimes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return added(model, x, y) if next(number) % 100 == 99 else forgotten(model, x, y)

    assert train(HEADS["sparse"]().train(), sometimes) == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_pass_once(use_reentrant: bool) -> None:
    head = HEADS["sparse"]().train()

    def wrapped(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(checkpoint(model, x.requires_grad_(True), use_reentrant=use_reentrant), y)

    train(head, wrapped, 3)
    assert head.router.loss_watch.num_passes == 3 and head.router.loss_watch.is_unused


def test_checkpointing_passes_the_gradient_of_the_loss_on() -> None:
    head = HEADS["sparse"]().train()

    def wrapped(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits, aux_loss, _ = checkpoint(model, x, True, use_reentrant=False)
        return F.cross_entropy(logits, y) + aux_loss

    train(head, wrapped, 1)
    assert head.router.loss_watch.has_gradient


def test_many_passes_before_one_backward_are_no_reason_for_a_warning() -> None:
    layer = MoELayer(4, num_experts=4, expert_width=2).train()

    def unrolled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(())
        for _ in range(MANY):
            output = model(x, return_routing=True)
            total = total + output.output.square().mean() + output.aux_loss
        return total

    assert train(layer, unrolled, 1) == []
    assert layer.router.loss_watch.has_gradient


def test_passes_without_a_backward_do_not_count() -> None:
    head = HEADS["sparse"]().train()

    def run() -> None:
        for _ in range(MANY):
            head(torch.randn(2, 4))

    assert messages(run) == []


def in_evaluation(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return forgotten(model.eval(), x, y)


def frozen_gate(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.router.requires_grad_(False)
    return forgotten(model, x.requires_grad_(True), y)


def without_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        model(x)
    return torch.zeros((), requires_grad=True)


def per_sample_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda values: F.cross_entropy(torch.func.functional_call(model, values, (x,)), y))(parameters)
    return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize("loss", [in_evaluation, frozen_gate, without_gradient, per_sample_gradient])
def test_passes_that_train_no_gate_do_not_count(loss: Callable[..., Tensor]) -> None:
    head = SparseMoE(4, 3, num_experts=4, expert_width=2, dropout=0.0, dispatch="all").train()
    assert train(head, loss) == []
    assert head.router.loss_watch.num_passes == 0


@pytest.mark.parametrize(
    "head",
    [
        SparseMoE(4, 3, num_experts=4, balance=None),
        SparseMoE(4, 3, num_experts=4, balance={"switch": 0.0}),
        SparseMoE(4, 3, num_experts=4, router=BiasBalancedRouter(4, 4)),
        SparseMoE(4, 3, num_experts=4, router=ExpertChoiceRouter(4, 4)),
        SparseMoE(4, 3, num_experts=4, k=4),
        SoftMoE(4, 3, num_experts=1),
    ],
)
def test_a_router_without_a_balance_loss_is_not_reported(head: nn.Module) -> None:
    assert train(head.train(), forgotten) == []


def test_a_compiled_model_is_not_counted_and_has_one_graph() -> None:
    torch.compiler.reset()
    head = HEADS["sparse"]().train()
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    assert train(compiled, forgotten, 20) == []
    assert head.router.loss_watch.num_passes == 0
    assert train(compiled, added, 20) == []


def test_a_copy_counts_on_its_own_and_the_state_dict_knows_nothing() -> None:
    head = HEADS["sparse"]().train()
    train(head, forgotten, 3)
    twin = copy.deepcopy(head)
    train(twin, forgotten, 2)
    assert (head.router.loss_watch.num_passes, twin.router.loss_watch.num_passes) == (3, 5)
    assert not any("watch" in name for name in head.state_dict())


def test_unused_means_passes_and_no_gradient() -> None:
    watch = LossWatch()
    logits = torch.ones(2, 3, requires_grad=True) * 2
    watch.watch(logits, "router")
    assert not watch.is_unused
    logits.sum().backward(retain_graph=True)
    assert watch.is_unused
    loss = logits.square().sum()
    watch.attach(loss)
    assert watch.is_unused
    loss.backward()
    assert not watch.is_unused
    watch.restart()
    assert watch.num_passes == 0 and not watch.has_gradient
