import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_heads import SoftMoE, SparseMoE
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.loss_landscape.directions import filter_normalized, random_direction, split_direction
from moe_heads.analysis.loss_landscape.function import loss_landscape
from tests.support.hand_routers import HandModel
from tests.support.untouched import untouched

pytestmark = pytest.mark.usefixtures("without_mean_check")


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def smooth_problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    return model, (torch.randn(11, 4, dtype=torch.float64), torch.randint(3, (11,)))


def test_line_of_a_linear_model_is_its_parabola() -> None:
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    direction = torch.randn(4, dtype=torch.float64)
    line = loss_landscape(model, mse, [(x, y)], direction1=direction)
    residual = (model(x) - y).detach()
    slope = x @ direction[:3, None] + direction[3]
    expected = torch.stack([(residual + a * slope).square().mean() for a in line.alphas])
    torch.testing.assert_close(line.losses, expected, rtol=1e-12, atol=0)
    assert line.alphas.tolist() == pytest.approx([-0.5 + 0.05 * i for i in range(21)], abs=1e-15)
    assert line.curvatures[0] == pytest.approx(2 * slope.square().mean().item(), rel=1e-9)


def test_plane_equals_the_model_with_replaced_parameters() -> None:
    model, batch = smooth_problem()
    model.eval()
    first, second = (filter_normalized(model, random_direction(model, seed)) for seed in (0, 1))
    plane = loss_landscape(model, cross_entropy, [batch], direction1=first, direction2=second, num_points=5)
    assert plane.betas is not None
    parts1, parts2 = split_direction(model, first), split_direction(model, second)
    own = dict(model.named_parameters())
    for i, alpha in enumerate(plane.alphas.tolist()):
        for j, beta in enumerate(plane.betas.tolist()):
            moved = {name: p.detach() + alpha * parts1[name] + beta * parts2[name] for name, p in own.items()}
            loss = nn.functional.cross_entropy(functional_call(model, moved, (batch[0],)), batch[1])
            assert plane.losses[i, j].item() == pytest.approx(loss.item(), rel=1e-12)
    assert plane.alphas.tolist() == [-1, -0.5, 0, 0.5, 1] == plane.betas.tolist()


def test_center_is_the_measured_loss_to_the_bit() -> None:
    model, batch = smooth_problem()
    model.eval()
    direction = random_direction(model)
    expected = cross_entropy(model, batch).item()
    line = loss_landscape(model, cross_entropy, [batch], direction1=direction)
    assert line.center_loss == expected == line.losses[10].item()
    # torch.linspace misses zero in the middle of this one
    given = loss_landscape(model, cross_entropy, [batch], direction1=direction, alphas=torch.linspace(-0.5, 0.5, 21))
    assert given.alphas[10] == 0
    assert given.losses[10].item() == expected


def test_second_difference_along_a_unit_direction_is_the_curvature() -> None:
    model, batch = smooth_problem()
    model.eval()
    direction = random_direction(model)
    direction /= direction.norm()
    step = 1e-3
    line = loss_landscape(model, cross_entropy, [batch], direction1=direction, alphas=[-step, 0.0, step])
    parts = list(split_direction(model, direction).values())
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(cross_entropy(model, batch), parameters, create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(gradient, parts, strict=True))
    product = torch.autograd.grad(slope, parameters)
    expected = sum((h * v).sum() for h, v in zip(product, parts, strict=True)).item()
    assert line.curvatures[0] == pytest.approx(expected, rel=1e-4)
    assert line.metrics()["curvature_1"] == line.curvatures[0]


def test_uneven_batches_equal_one_batch() -> None:
    model, (x, y) = smooth_problem()

    def accuracy(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (m(batch[0]).argmax(1) == batch[1]).double().mean()

    options = {"direction1": 5 * random_direction(model), "accuracy_fn": accuracy, "num_points": 5}
    whole = loss_landscape(model, cross_entropy, [(x, y)], **options)
    split = loss_landscape(model, cross_entropy, zip(x.split([1, 3, 7]), y.split([1, 3, 7]), strict=True), **options)
    torch.testing.assert_close(split.losses, whole.losses, rtol=1e-12, atol=0)
    assert whole.accuracies is not None and whole.accuracies.unique().numel() > 1
    torch.testing.assert_close(split.accuracies, whole.accuracies)
    assert split.num_samples == whole.num_samples == 11
    assert split.center_accuracy == pytest.approx(whole.accuracies[2].item())


def test_shared_parameters_move_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    model[1].weight = model[0].weight
    x = torch.randn(3, 2, dtype=torch.float64)
    direction = torch.randn(4, dtype=torch.float64)
    line = loss_landscape(model, lambda m, b: m(b).square().sum(), [x], direction1=direction, alphas=[0.0, 2.0])
    moved = model[0].weight.detach() + 2 * direction.view(2, 2)
    assert line.losses[1].item() == pytest.approx((x @ moved.T @ moved.T).square().sum().item())


def test_flips_are_the_share_of_samples_with_another_expert() -> None:
    """Expert 0 leads by 1, 2, 3, 4 in four samples; raising expert 1 by alpha turns those with a smaller lead."""
    model = HandModel(2, k=1)
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    line = loss_landscape(
        model,
        lambda m, b: m(b).sum(),
        [x[:3], x[3:]],
        direction1=torch.tensor([0.0, 1.0]),
        alphas=[-1.0, 0.0, 1.5, 3.5, 9.0],
    )
    assert line.routing_flips is not None
    assert line.routing_flips.tolist() == [0, 0, 0.25, 0.75, 1]


def test_the_order_of_the_chosen_experts_does_not_count() -> None:
    model = HandModel(3, k=2)
    x = torch.tensor([[2.0, 1.0, 0.0]])
    direction = torch.tensor([0.0, 0.0, 1.0])
    line = loss_landscape(
        model, lambda m, b: m(b).sum(), [x], direction1=torch.tensor([0.0, 1.0, 0.0]), alphas=[0.0, 1.5]
    )
    assert line.routing_flips is not None and not line.routing_flips.any()
    line = loss_landscape(model, lambda m, b: m(b).sum(), [x], direction1=direction, alphas=[0.0, 1.5])
    assert line.routing_flips is not None and line.routing_flips.tolist() == [0, 1]


def test_a_sample_of_tokens_flips_with_one_of_its_tokens() -> None:
    model = HandModel(2, k=1)
    x = torch.tensor([[[1.0, 0.0], [5.0, 0.0]], [[5.0, 0.0], [5.0, 0.0]]])
    line = loss_landscape(
        model, lambda m, b: m(b).sum(), [x], direction1=torch.tensor([0.0, 1.0]), alphas=[0.0, 2.0, 9.0]
    )
    assert line.routing_flips is not None
    assert line.routing_flips.tolist() == [0, 0.5, 1]


def test_a_plane_through_real_heads() -> None:
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    for head in (SparseMoE(6, 3, num_experts=4, expert_width=5), SoftMoE(6, 3, num_experts=4, expert_width=5)):
        model = nn.Sequential(nn.Linear(6, 6), head)
        directions = [filter_normalized(model, random_direction(model, seed)) for seed in (0, 1)]
        with untouched(model):
            plane = loss_landscape(
                model, cross_entropy, [(x, y)], direction1=directions[0], direction2=directions[1], num_points=3
            )
        assert plane.losses.shape == (3, 3)
        assert plane.routing_flips is not None
        assert plane.routing_flips[1, 1] == 0
        assert plane.routing_flips.max() > 0


def test_no_flips_without_a_router() -> None:
    model, batch = smooth_problem()
    line = loss_landscape(model, cross_entropy, [batch], direction1=random_direction(model), num_points=3)
    assert line.routing_flips is None
    assert line.accuracies is None


def test_routers_that_see_other_rows_than_at_the_center() -> None:
    model = HandModel(2, k=1)

    def loss(m: HandModel, batch: Tensor) -> Tensor:
        return m(batch[: 1 if m.head.router.shift.any() else 2]).sum()

    with pytest.raises(
        ValueError, match=r"model: expected the same routed rows at every point .* got shapes \[\(1, 2\)"
    ):
        loss_landscape(model, loss, [torch.ones(2, 2)], direction1=torch.ones(2), alphas=[0.0, 1.0])


def test_losses_that_are_not_finite_stay_so() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    line = loss_landscape(
        model, lambda m, b: m(b).log().mean(), [torch.ones(2, 1)], direction1=torch.ones(1), alphas=[-2.0, -1.0, 0.0]
    )
    assert math.isnan(line.losses[0])
    assert line.losses[1:].tolist() == [-math.inf, 0]
    assert line.num_nonfinite == 2


def test_random_losses_draw_the_same_numbers_at_every_point() -> None:
    model = nn.Linear(1, 1, bias=False)
    line = loss_landscape(
        model,
        lambda m, b: torch.rand(()) + 0 * m(b).sum(),
        [torch.ones(1, 1)] * 2,
        direction1=torch.ones(1),
        num_points=3,
    )
    assert line.losses.unique().numel() == 1


def test_everything_is_put_back_also_after_an_interruption() -> None:
    model, batch = smooth_problem()
    model[0].bias.requires_grad_(False)
    cross_entropy(model, batch).backward()
    direction = random_direction(model)
    with untouched(model):
        loss_landscape(model, cross_entropy, [batch], direction1=direction)
    calls = []

    def interrupted(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(m[0].weight.sum().item())
        if len(calls) == 5:
            raise KeyboardInterrupt
        return cross_entropy(m, b)

    with untouched(model), pytest.raises(KeyboardInterrupt):
        loss_landscape(model, interrupted, [batch], direction1=direction)
    assert len(set(calls)) == 4  # the parameters had moved


def test_progress_counts_the_points() -> None:
    model, batch = smooth_problem()
    steps: list[tuple[int, int]] = []
    options = {"direction1": random_direction(model), "direction2": random_direction(model, 1), "num_points": 3}
    loss_landscape(
        model, cross_entropy, [batch], progress=Progress(show=lambda *step: steps.append(step[:2])), **options
    )
    assert steps == [(done, 9) for done in range(1, 10)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction1": torch.ones(3)}, r"direction1: expected shape \(2,\)"),
        ({"direction2": torch.ones(3)}, r"direction2: expected shape \(2,\)"),
        ({"alphas": []}, r"alphas: expected at least two finite, increasing numbers, got \[\]"),
        ({"alphas": [0.0, math.inf]}, r"alphas: .* got \[0.0, inf\]"),
        ({"alphas": [1.0, 0.0]}, "alphas: expected at least two finite, increasing"),
        ({"direction2": torch.ones(2), "betas": [0.0, 0.0]}, "betas: expected at least two finite, increasing"),
        ({"betas": [0.0, 1.0]}, "betas: expected None without direction2, got coordinates"),
        ({"seed": None}, "seed: expected an int from 0 to .* got None"),
        ({"num_points": 1}, "num_points: expected an integer of at least 2, got 1"),
        ({"num_points": 2.5}, r"num_points: expected an integer of at least 2, got 2\.5"),
        ({"refine": True}, "refine: expected an integer of at least 0, got True"),
        ({"batches": []}, "batches: expected at least one batch"),
        ({"loss_fn": lambda m, b: m(b)}, r"loss_fn: expected a scalar tensor, .* got shape \(4, 1\)"),
        ({"loss_fn": lambda m, b: 1.0}, "loss_fn: expected a scalar tensor, .* got float"),
        ({"loss_fn": lambda m, b: m(b).sum() / 0}, "loss_fn: expected a finite loss of the given model, got -?inf"),
        ({"accuracy_fn": lambda m, b: m(b)}, r"accuracy_fn: expected a scalar tensor, .* got shape \(4, 1\)"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    arguments = {"loss_fn": lambda m, b: m(b).sum(), "batches": [torch.ones(4, 1)], "direction1": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        loss_landscape(nn.Linear(1, 1), **(arguments | options))
