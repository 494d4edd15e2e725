"""Evaluation of a point: the losses at free and fixed routing, and the flips."""

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SoftMoE, SparseMoE, collect_routing, fixed_routing
from moe_heads.analysis import direction_sweep, loss_landscape, random_direction
from moe_heads.analysis.loss_landscape.directions import split_direction
from moe_heads.routers import BiasBalancedRouter, ExpertChoiceRouter, SwitchRouter
from tests.support.hand_routers import HandModel

pytestmark = pytest.mark.usefixtures("without_mean_check")


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sparse_problem(**options: object) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    head = SparseMoE(8, 3, num_experts=4, expert_width=5, **options)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), head).double().eval()
    x, y = torch.randn(60, 6, dtype=torch.float64), torch.randint(3, (60,))
    return model, list(zip(x.split([40, 20]), y.split([40, 20]), strict=True))


@pytest.mark.parametrize("k", [1, 2])
def test_every_point_is_the_moved_model_with_the_choices_of_the_center(k: int) -> None:
    model, batches = sparse_problem(k=k)
    direction = random_direction(model)
    line = loss_landscape(model, cross_entropy, batches, direction1=direction, num_points=5)
    assert line.losses_fixed_routing is not None and line.routing_gap is not None
    references = []
    for batch in batches:
        with torch.no_grad(), collect_routing(model) as reference:
            model(batch[0])
        references.append(reference)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for alpha, found in zip(line.alphas.tolist(), line.losses_fixed_routing.tolist(), strict=True):
        with torch.no_grad():
            for name, part in split_direction(model, direction).items():
                model.get_parameter(name).copy_(start[name] + alpha * part)
            expected = 0.0
            for batch, reference in zip(batches, references, strict=True):
                with fixed_routing(model, reference):
                    expected += len(batch[0]) * cross_entropy(model, batch).item() / 60
        assert found == pytest.approx(expected, rel=1e-12)
    assert line.losses_fixed_routing[2] == line.losses[2] == line.center_loss
    assert line.routing_gap.abs().max() > 1e-4
    assert line.metrics()["routing_gap_max"] == line.routing_gap.abs().max()


def test_where_no_sample_flips_the_two_are_equal_without_a_second_pass() -> None:
    model, batches = sparse_problem()
    calls = []

    def counted(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(len(batch[0]))
        return cross_entropy(m, batch)

    # the last layer of the experts moves no router
    experts = [name for name, _ in model.named_parameters() if "experts" in name]
    direction = random_direction(model, params=experts)
    line = loss_landscape(model, counted, batches, direction1=direction, params=experts, num_points=5)
    assert line.losses_fixed_routing is not None
    assert torch.equal(line.losses_fixed_routing, line.losses)
    assert line.losses.unique().numel() == 5
    # three more to prove that features can be kept, and the center once more without gradients
    assert len(calls) == 2 * (5 + 3 + 1)


@pytest.mark.parametrize("router", [SwitchRouter, BiasBalancedRouter, ExpertChoiceRouter])
def test_every_router_of_ours(router: type) -> None:
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, router=router(6, 4))
    batch = torch.randn(40, 6), torch.randint(3, (40,))
    line = loss_landscape(head, cross_entropy, [batch], direction1=random_direction(head), num_points=5)
    assert line.losses_fixed_routing is not None and line.routing_gap is not None
    assert line.routing_gap.abs().max() > 0


def test_no_fixed_routing_for_soft_and_dense_heads() -> None:
    batch = torch.randn(20, 6), torch.randint(3, (20,))
    for head in (SoftMoE(6, 3, num_experts=4, expert_width=5), nn.Linear(6, 3)):
        line = loss_landscape(head, cross_entropy, [batch], direction1=random_direction(head), num_points=3)
        assert line.losses_fixed_routing is None and line.routing_gap is None
        assert "routing_gap_max" not in line.metrics()


def test_a_router_without_rechosen() -> None:
    model, x = HandModel(2, k=1), torch.tensor([[1.0, 0.0]])
    options = {"direction1": torch.tensor([0.0, 1.0]), "alphas": [0.0, 2.0]}
    line = loss_landscape(model, lambda m, b: m(b).sum(), [x], **options)
    assert line.routing_flips is not None and line.routing_flips.tolist() == [0, 1]
    assert line.losses_fixed_routing is None
    with pytest.raises(ValueError, match=r"fixed_routing: expected False for a model with a sparse router .* got True"):
        loss_landscape(model, lambda m, b: m(b).sum(), [x], fixed_routing=True, **options)


def test_fixed_routing_is_optional() -> None:
    model, batches = sparse_problem()
    line = loss_landscape(
        model, cross_entropy, batches, direction1=random_direction(model), num_points=3, fixed_routing=False
    )
    assert line.losses_fixed_routing is None
    assert line.routing_flips is not None and line.routing_flips.max() > 0


def test_random_losses_draw_the_same_numbers_free_and_fixed() -> None:
    model, batches = sparse_problem()

    def noisy(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.rand(()) + 0 * cross_entropy(m, batch)

    line = loss_landscape(model, noisy, batches, direction1=random_direction(model), num_points=3)
    assert line.routing_flips is not None and line.routing_flips.max() > 0
    assert line.losses_fixed_routing is not None and torch.equal(line.losses_fixed_routing, line.losses)


def test_the_curvature_is_checked_on_the_loss_whose_hessian_it_is() -> None:
    """That at fixed routing, which is smooth in the gate; with free routing its jumps swamp the second difference."""
    model, batches = sparse_problem()
    params = ["2.router"]
    direction = random_direction(model, params=params)
    line = loss_landscape(
        model,
        cross_entropy,
        batches,
        direction1=direction,
        params=params,
        check_curvatures=True,
        alphas=[-0.01, 0.0, 0.01],
    )
    (check,) = line.checks
    assert check.second_difference == pytest.approx(check.exact, rel=1e-3)
    assert check.agrees
    assert line.routing_flips is not None and line.routing_flips.max() > 0
    assert abs(line.curvatures[0] - check.exact) > 10 * abs(check.exact)


def test_a_sweep_measures_both() -> None:
    model, batches = sparse_problem()
    sweep = direction_sweep(model, cross_entropy, batches, num_directions=3, num_points=3)
    assert sweep.losses_fixed_routing is not None and sweep.routing_flips is not None
    assert sweep.losses_fixed_routing.shape == sweep.routing_flips.shape == (3, 3)
    assert sweep.metrics()["routing_gap_max"] > 0


def test_a_landscape_knows_whether_its_routers_choose() -> None:
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    for head, is_soft in (
        (SoftMoE(6, 3, num_experts=4, expert_width=5), True),
        (SparseMoE(6, 3, num_experts=4, expert_width=5), False),
        (nn.Linear(6, 3), False),
    ):
        line = loss_landscape(head, cross_entropy, [(x, y)], direction1=random_direction(head), alphas=[-9.0, 0.0, 9.0])
        assert line.is_soft == is_soft
        assert ("a sparse head" in line.summary()) == isinstance(head, SparseMoE)
        assert ("of a soft head" in line.summary()) == is_soft
