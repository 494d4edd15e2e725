"""Landscapes towards checkpoints, of parts of a model, on the plane of a run, refined, resumed, and checked."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis import (
    filter_normalized,
    layer_normalized,
    loss_landscape,
    random_direction,
    sharpness,
    trajectory_plane,
)
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult
from moe_heads.analysis.sharpness.hessian import directional_curvatures
from tests.support.untouched import untouched


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def network(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), activation(), nn.Linear(6, 3))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(12, 4, dtype=dtype), torch.randint(3, (12,))


def state_of_another(model: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics of a model that has seen data."""
    other = network()
    other(10 * torch.randn(50, 4) + 3)
    return {name: value.clone() for name, value in other.state_dict().items()}


def loss_with(model: nn.Module, state: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> float:
    other = network()
    other.load_state_dict(state)
    return cross_entropy(other.eval(), data).item()


def test_a_line_between_two_checkpoints_hits_both_to_the_bit() -> None:
    model, data = network(), batch()
    state, own = state_of_another(model), {k: v.clone() for k, v in model.state_dict().items()}
    with untouched(model):
        line = loss_landscape(model, cross_entropy, [data], direction1=state, alphas=torch.linspace(0, 1, 5))
    assert line.losses[0].item() == loss_with(model, own, data) == line.center_loss
    assert line.losses[4].item() == loss_with(model, state, data)
    floating = {key: value.lerp(own[key], 0.5) if value.is_floating_point() else value for key, value in state.items()}
    assert line.losses[2].item() == pytest.approx(loss_with(model, floating, data), rel=1e-5)


def test_a_plane_of_three_checkpoints_hits_all_to_the_bit() -> None:
    model, data = network(), batch()
    first, second = state_of_another(model), state_of_another(model)
    plane = loss_landscape(
        model, cross_entropy, [data], direction1=first, direction2=second, alphas=[0.0, 1.0], betas=[0.0, 0.5, 1.0]
    )
    assert plane.losses[1, 0].item() == loss_with(model, first, data)
    assert plane.losses[0, 2].item() == loss_with(model, second, data)


def test_towards_a_state_only_with_the_parameters_that_are_asked_for() -> None:
    model, data = network(), batch()
    state = state_of_another(model)
    line = loss_landscape(model, cross_entropy, [data], direction1=state, params=["3"], alphas=[0.0, 1.0])
    mixed = model.state_dict() | {key: value for key, value in state.items() if key.startswith("3.")}
    assert line.losses[1].item() == loss_with(model, mixed, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("3.bias"), "direction1: expected a state with all trainable .* without '3.bias'"),
        (
            lambda state: state.update({"3.bias": torch.ones(2)}),
            r"direction1: expected finite '3.bias' of shape \(3,\), got shape \(2,\)",
        ),
        (lambda state: state["3.bias"].fill_(math.nan), "direction1: expected finite '3.bias' .* got nan or inf"),
    ],
)
def test_a_state_that_does_not_fit(change: Any, message: str) -> None:
    model = network()
    state = state_of_another(model)
    change(state)
    with pytest.raises(ValueError, match=message):
        loss_landscape(model, cross_entropy, [batch()], direction1=state)


@pytest.mark.parametrize("normalize", [filter_normalized, layer_normalized])
@pytest.mark.parametrize("biases", ["zero", "normalized"])
def test_a_normalized_plane_does_not_see_how_relu_layers_are_scaled(normalize: Any, biases: Any) -> None:
    """W1, b1 times c and W2 divided by c is the same function, and has the same plane; a raw one changes."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    data = batch(torch.float64)

    def planes() -> list[LossLandscapeResult]:
        raw = [random_direction(model, seed) for seed in (0, 1)]
        scaled = [normalize(model, direction, biases=biases) for direction in raw]
        return [
            loss_landscape(model, cross_entropy, [data], direction1=one, direction2=two, num_points=5)
            for one, two in (scaled, raw)
        ]

    before = planes()
    with torch.no_grad():
        model[0].weight.mul_(8.0)
        model[0].bias.mul_(8.0)
        model[2].weight.div_(8.0)
    after = planes()
    torch.testing.assert_close(after[0].losses, before[0].losses, rtol=1e-10, atol=0)
    assert (after[1].losses - before[1].losses).abs().max() > 0.1


def test_curvatures_of_slices_agree_with_the_hessian() -> None:
    model, data = network().double().eval(), batch(torch.float64)
    spectrum = sharpness(model, cross_entropy, [data], num_eigenvalues=2, keep_eigenvectors=True, density=False)
    assert spectrum.eigenvectors is not None
    first, second = spectrum.eigenvectors
    with untouched(model):
        plane = loss_landscape(
            model, cross_entropy, [data], direction1=first, direction2=second, num_points=3, check_curvatures=True
        )
    assert [check.exact for check in plane.checks] == pytest.approx(spectrum.eigenvalues, rel=1e-4)
    for check in plane.checks:
        assert check.second_difference == pytest.approx(check.exact, rel=1e-5)
        assert check.agrees
    assert plane.metrics()["curvature_1_exact"] == plane.checks[0].exact
    assert plane.metrics()["curvature_2_agrees"] == 1
    assert "they agree" in plane.summary()
    assert plane.direction_norms == pytest.approx((1, 1))


def test_kinks_are_reported() -> None:
    model, data = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    model.weight.data.fill_(1.0)
    line = loss_landscape(
        model, lambda m, b: 1 + (m(b) - 1).abs().sum(), [data], direction1=torch.ones(1), check_curvatures=True
    )
    assert line.checks[0].exact == 0
    assert not line.checks[0].agrees
    assert "**they do not agree**" in line.summary()


def test_a_curvature_belongs_to_its_direction() -> None:
    """A state to go towards has no check; that of the flat direction is along the second axis."""
    model, data = network().double().eval(), batch(torch.float64)
    state = {name: value + 0.1 for name, value in model.state_dict().items()}
    flat = random_direction(model)
    plane = loss_landscape(
        model, cross_entropy, [data], direction1=state, direction2=flat, num_points=3, check_curvatures=True
    )
    (check,) = plane.checks
    assert check.direction == 2
    assert check.exact == directional_curvatures(model, cross_entropy, [data], [flat])[0]
    assert check.agrees
    assert check.second_difference == pytest.approx(check.exact, rel=1e-4)
    assert "curvature_1_exact" not in plane.metrics() and plane.metrics()["curvature_2_agrees"] == 1
    assert "Curvature along direction 2:" in plane.summary()


def test_the_curvature_is_that_of_the_loss_with_the_random_numbers_of_the_seed() -> None:
    model, data = nn.Linear(4, 3).double(), batch(torch.float64)

    def noisy(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(m, (b[0] * (1 + torch.randn(1, dtype=torch.float64)), b[1]))

    line = loss_landscape(
        model,
        noisy,
        [data, batch(torch.float64)],
        direction1=random_direction(model),
        num_points=3,
        check_curvatures=True,
        seed=5,
    )
    assert line.checks[0].agrees


def test_directional_curvatures_are_quadratic_forms() -> None:
    model, data = network().double().eval(), batch(torch.float64)
    vectors = [random_direction(model, seed) for seed in range(3)]
    one, two, three = directional_curvatures(model, cross_entropy, [data], [*vectors[:2], vectors[0] + vectors[1]])
    (difference,) = directional_curvatures(model, cross_entropy, [data], [vectors[0] - vectors[1]])
    assert three + difference == pytest.approx(2 * (one + two), rel=1e-9)
    (of_a_part,) = directional_curvatures(model, cross_entropy, [data], [torch.ones(21).double()], params=["3"])
    whole = torch.cat([torch.zeros(len(vectors[0]) - 21), torch.ones(21)]).double()
    assert of_a_part == pytest.approx(directional_curvatures(model, cross_entropy, [data], [whole])[0], rel=1e-9)


def test_the_plane_of_a_run_goes_through_its_points() -> None:
    model, data = network().double().eval(), batch(torch.float64)
    center = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    basis = torch.linalg.qr(torch.randn(len(center), 2, dtype=torch.float64)).Q.T
    wanted = torch.tensor([[3.0, 0.5], [2.0, 1.0], [1.0, -0.5], [0.0, 0.0]], dtype=torch.float64)
    plane = trajectory_plane(model, list(center + wanted @ basis))
    run = plane.trajectory
    assert run.residuals.max() < 1e-6
    torch.testing.assert_close(run.distances, wanted.norm(dim=1))
    for state, (alpha, beta) in zip(wanted @ basis, run.coordinates.tolist(), strict=True):
        place = alpha * plane.direction1 + beta * plane.direction2
        torch.testing.assert_close(place, state, rtol=0, atol=1e-9)
    torch.nn.utils.vector_to_parameters(center + wanted[0] @ basis, model.parameters())
    expected = cross_entropy(model, data).item()
    torch.nn.utils.vector_to_parameters(center, model.parameters())
    alpha, beta = run.coordinates[0].tolist()
    found = loss_landscape(
        model,
        cross_entropy,
        [data],
        direction1=plane.direction1,
        direction2=plane.direction2,
        alphas=sorted([0.0, alpha]),
        betas=sorted([0.0, beta]),
        trajectory=run,
    )
    corner = found.losses[int(alpha > 0), int(beta > 0)].item()
    assert corner == pytest.approx(expected, rel=1e-9)
    assert "The trajectory has 4 points" in found.summary()


def test_refinement_finds_the_jump_of_a_sparse_head() -> None:
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, k=1)
    data = torch.randn(4, 6), torch.randint(3, (4,))
    direction = random_direction(head)
    options: dict[str, Any] = {"direction1": direction, "num_points": 5}
    coarse = loss_landscape(head, cross_entropy, [data], **options)
    fine = loss_landscape(head, cross_entropy, [data], refine=8, **options)
    assert len(fine.alphas) == 13 and bool((fine.alphas.diff() > 0).all())
    assert set(coarse.alphas.tolist()) < set(fine.alphas.tolist())
    dense = loss_landscape(head, cross_entropy, [data], direction1=direction, alphas=fine.alphas)
    assert torch.equal(dense.losses, fine.losses)
    steps = fine.losses.diff().abs()
    assert fine.alphas.diff()[steps.argmax()] < 0.25  # the largest jump is between two points that are close


@pytest.mark.parametrize("refine", [-1, 1.5])
def test_refine_is_a_number_of_points(refine: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"refine: expected an integer of at least 0, got {refine}"):
        loss_landscape(model, cross_entropy, [batch()], direction1=random_direction(model), refine=refine)
    with pytest.raises(ValueError, match="refine: expected 0 for a plane, got 2"):
        loss_landscape(
            model,
            cross_entropy,
            [batch()],
            direction1=random_direction(model),
            direction2=random_direction(model),
            refine=2,
        )


@pytest.mark.parametrize("has_gradients", [False, True])
def test_no_memory_beside_the_directions_and_one_copy_of_the_parameters(has_gradients: bool) -> None:
    from examples.benchmarks.bench.peak_memory import peak_memory

    model = nn.Sequential(nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 600))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    first, second = (random_direction(model, seed) for seed in (0, 1))
    x = torch.randn(2, 600)
    options: dict[str, Any] = {"direction1": first, "direction2": second, "num_points": 3}
    if has_gradients:
        model(x).sum().backward()
    peak = peak_memory(lambda: loss_landscape(model, lambda m, b: m(b).square().mean(), [x], **options))
    assert size < peak < 1.05 * size
