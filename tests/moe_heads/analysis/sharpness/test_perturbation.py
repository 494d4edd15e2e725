import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.sharpness.perturbation import PerturbationSharpnessResult, perturbation_sharpness
from tests.support.processes import run_on_ranks
from tests.support.untouched import untouched

pytestmark = pytest.mark.usefixtures("without_mean_check")

ONE = torch.ones(1, 1, dtype=torch.float64)
VALUES = ("average", "average_stderr", "sam", "worst", "gradient_norm", "center_loss")


class Weights(nn.Module):
    """A model that is a vector of weights."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def quadratic(hessian: Tensor, center: Tensor) -> Callable[[Weights, Tensor], Tensor]:
    """Loss ½ (w − center)ᵀ H (w − center)."""
    return lambda model, batch: 0.5 * (model.w - center) @ hessian @ (model.w - center)


def linear(slope: Tensor) -> Callable[[Weights, Tensor], Tensor]:
    return lambda model, batch: slope @ model.w


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def values_of(result: PerturbationSharpnessResult) -> list[float]:
    return [getattr(result, name) for name in VALUES]


def random_hessian(size: int) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T


def relu_network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return model, (torch.randn(15, 4, dtype=torch.float64), torch.randint(3, (15,)))


def rescaled(model: nn.Module, *factors: float) -> nn.Module:
    """Return the same function with each hidden layer multiplied by a factor and the next one divided by it."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    for first, second, factor in zip(layers, layers[1:], factors, strict=False):
        first.weight.data *= factor
        first.bias.data *= factor
        second.weight.data /= factor
    return model


@pytest.mark.parametrize("adaptive", [True, False])
def test_average_of_a_quadratic_is_half_the_trace(adaptive: bool) -> None:
    """The average is σ²/2 Σ cᵢ² Hᵢᵢ, with or without a gradient, within two standard errors for nine of ten seeds."""
    model = Weights(*range(-4, 9))
    hessian = random_hessian(13)
    scale = model.w.detach().abs() if adaptive else torch.ones(13, dtype=torch.float64)
    expected = 0.3**2 / 2 * float(scale.square() @ hessian.diag())
    losses = [quadratic(hessian, center) for center in (model.w.detach().clone(), torch.zeros(13, dtype=torch.float64))]
    options = {"adaptive": adaptive, "average_radius": 0.3, "num_draws": 15, "num_steps": 0}
    results = [perturbation_sharpness(model, losses[seed % 2], [ONE], seed=seed, **options) for seed in range(60)]
    errors = torch.tensor([(r.average - expected) / r.average_stderr for r in results])
    assert 0.8 < float((errors.abs() < 2).double().mean()) < 1
    means = torch.tensor([r.average for r in results], dtype=torch.float64)
    spread = float(means.std()) / math.sqrt(len(means))
    assert float(means.mean()) == pytest.approx(expected, abs=3 * spread)
    assert spread < 0.05 * expected
    assert results[0].average_curvature == 2 * results[0].average / 0.3**2


def test_pairs_cancel_a_linear_loss() -> None:
    slope = torch.tensor([1.0, 2.0], dtype=torch.float64)
    result = perturbation_sharpness(Weights(3.0, 4.0), linear(slope), [ONE])
    assert result.average == pytest.approx(0, abs=1e-14)
    assert result.average_stderr == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("adaptive", [True, False])
def test_worst_case_of_a_quadratic_is_half_the_largest_eigenvalue(adaptive: bool) -> None:
    """Without a gradient the SAM step takes a random direction."""
    model = Weights(1.0, -2.0, 0.5, 3.0)
    hessian = random_hessian(4)
    scale = torch.diag(model.w.detach().abs()) if adaptive else torch.eye(4, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(scale @ hessian @ scale)
    loss = quadratic(hessian, model.w.detach().clone())
    result = perturbation_sharpness(model, loss, [ONE], adaptive=adaptive, radius=0.7, num_steps=200)
    assert result.gradient_norm == 0
    assert result.worst_curvature == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert 0.7**2 / 2 * float(eigenvalues[0]) < result.sam < result.worst


def test_worst_case_of_an_indefinite_quadratic() -> None:
    """At a saddle with a larger downward curvature, a plain power iteration would find the downward direction."""
    hessian = torch.diag(torch.tensor([2.0, -3.0, 1.0], dtype=torch.float64))
    model = Weights(1.0, 1.0, 1.0)
    loss = quadratic(hessian, model.w.detach().clone())
    result = perturbation_sharpness(model, loss, [ONE], radius=1.0, num_steps=200)
    assert result.worst == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_worst_case_of_a_linear_loss_is_the_dual_norm_of_its_slope(norm: Any, adaptive: bool) -> None:
    slope = torch.tensor([1.0, -2.0, 3.0, 5.0], dtype=torch.float64)
    model = Weights(3.0, -4.0, 0.5, 0.0)  # the last one does not move when adaptive
    scaled = slope * model.w.detach().abs() if adaptive else slope
    expected = float(scaled.norm(p=2 if norm == "l2" else 1))
    result = perturbation_sharpness(model, linear(slope), [ONE], norm=norm, adaptive=adaptive, radius=0.2)
    assert result.gradient_norm == pytest.approx(expected)
    assert result.worst == pytest.approx(0.2 * expected)
    assert result.sam == pytest.approx(0.2 * expected)
    assert result.num_fixed == int(adaptive)


def test_worst_case_in_a_box_is_at_its_best_corner() -> None:
    hessian = random_hessian(5)
    model = Weights(1.0, 2.0, -1.0, 0.5, 3.0)
    loss = quadratic(hessian, torch.zeros(5, dtype=torch.float64))
    w = model.w.detach()
    corners = [w + 0.1 * w.abs() * torch.tensor(signs) for signs in itertools.product([-1.0, 1.0], repeat=5)]
    expected = float(
        max(loss(Weights(*corner.tolist()), ONE).detach() for corner in corners) - loss(model, ONE).detach()
    )
    result = perturbation_sharpness(model, loss, [ONE], norm="linf", radius=0.1)
    assert result.worst == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_points_of_the_ascent_are_in_the_ball(norm: Any) -> None:
    model, batch = relu_network()
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    lengths = []

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        value = cross_entropy(m, b)
        if value.requires_grad:
            u = (nn.utils.parameters_to_vector(m.parameters()).detach() - start) / start.abs()
            lengths.append((float(u.norm(p=2 if norm == "l2" else math.inf)), value.item()))
        return value

    result = perturbation_sharpness(model, loss, [batch], norm=norm, radius=0.4)
    assert len(lengths) == 1 + result.num_gradients  # the center of the average case records a graph too
    assert max(length for length, _ in lengths) <= 0.4 * (1 + 1e-12)
    assert lengths[2][0] == pytest.approx(0.4)  # the SAM point is on the boundary
    assert result.worst == max(value for _, value in lengths) - lengths[0][1] >= result.sam


def test_the_ascent_goes_beyond_the_sam_step() -> None:
    model, batch = relu_network()
    sam = perturbation_sharpness(model, cross_entropy, [batch], radius=2.0, num_steps=0)
    full = perturbation_sharpness(model, cross_entropy, [batch], radius=2.0)
    assert sam.worst == sam.sam == full.sam
    assert full.worst > 1.01 * full.sam


def test_worst_case_is_not_negative() -> None:
    """A SAM step that crosses the maximum ends at a lower loss."""
    result = perturbation_sharpness(
        Weights(1.0), lambda m, b: -(m.w - 1.1).square().sum(), [ONE], radius=1.0, num_steps=0
    )
    assert result.sam == pytest.approx(0.01 - 0.81)
    assert result.worst == 0
    ascended = perturbation_sharpness(
        Weights(1.0), lambda m, b: -(m.w - 1.1).square().sum(), [ONE], radius=1.0, num_steps=40
    )
    assert ascended.worst == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("factors", [(8.0, 0.25), (3.7, 0.021)])
def test_adaptive_values_survive_the_rescaling_of_layers(norm: Any, factors: tuple[float, float]) -> None:
    options = {"norm": norm, "radius": 0.5 if norm == "l2" else 0.05}
    model, batch = relu_network()
    before = perturbation_sharpness(model, cross_entropy, [batch], **options)
    other = rescaled(relu_network()[0], *factors)
    torch.testing.assert_close(other(batch[0]), model(batch[0]))  # the same function
    after = perturbation_sharpness(other, cross_entropy, [batch], **options)
    assert values_of(after) == pytest.approx(values_of(before), rel=1e-9)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_values_that_are_not_adaptive_do_not_survive_it(norm: Any) -> None:
    options = {"norm": norm, "adaptive": False, "radius": 0.1, "average_radius": 0.1}
    model, batch = relu_network()
    before = perturbation_sharpness(model, cross_entropy, [batch], **options)
    after = perturbation_sharpness(rescaled(model, 8.0, 0.25), cross_entropy, [batch], **options)
    assert after.center_loss == pytest.approx(before.center_loss)
    for name in ("average", "sam", "worst"):
        assert abs(getattr(after, name) / getattr(before, name) - 1) > 0.2


def test_uneven_batches_equal_one_batch() -> None:
    model, (x, y) = relu_network()
    whole = perturbation_sharpness(model, cross_entropy, [(x, y)])
    parts = zip(x.split([1, 4, 10]), y.split([1, 4, 10]), strict=True)
    split = perturbation_sharpness(model, cross_entropy, parts)
    assert values_of(split) == pytest.approx(values_of(whole), rel=1e-9)
    assert split.num_samples == whole.num_samples == 15
    assert whole.num_parameters == sum(p.numel() for p in model.parameters())
    assert (whole.num_draws, whole.num_evaluations) == (20, 41)


def test_only_the_chosen_parameters_move() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    seen = []

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        seen.append([p.detach().clone() for p in m.parameters()])
        return m(batch).square().mean()

    result = perturbation_sharpness(model, loss, [x], params=[model[1].weight])
    moved = [len({tuple(p.flatten().tolist()) for p in values}) > 1 for values in zip(*seen, strict=True)]
    assert moved == [False, False, True, False]
    assert result.num_parameters == 2


def test_equal_seeds_give_equal_results() -> None:
    model, batch = relu_network()
    first, again, other = (perturbation_sharpness(model, cross_entropy, [batch], seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.average != other.average
    assert first.worst == other.worst  # with a gradient it does not depend on random numbers


def test_random_losses_draw_the_same_numbers_at_every_point() -> None:
    def loss(model: Weights, batch: Tensor) -> Tensor:
        return torch.rand(()) + 0 * model.w.sum()

    result = perturbation_sharpness(Weights(1.0), loss, [ONE] * 2)
    assert result.average == result.average_stderr == result.worst == 0


def test_everything_is_put_back_also_after_an_error() -> None:
    model, batch = relu_network()
    model.append(nn.BatchNorm1d(3).double())
    cross_entropy(model, batch).backward()
    model[0].bias.requires_grad_(False)
    with untouched(model):
        perturbation_sharpness(model, cross_entropy, [batch])
    for call in (4, 45):  # in the draws, in the ascent
        calls: list[float] = []

        def interrupted(m: nn.Module, b: tuple[Tensor, Tensor], call: int = call, calls: list[float] = calls) -> Tensor:
            calls.append(m[0].weight.sum().item())
            if len(calls) == call:
                raise KeyboardInterrupt
            return cross_entropy(m, b)

        with untouched(model), pytest.raises(KeyboardInterrupt):
            perturbation_sharpness(model, interrupted, [batch])
        assert len(set(calls)) > 2  # the parameters had moved


def test_through_a_sparse_head_in_float32() -> None:
    model = nn.Sequential(nn.Linear(6, 6), SparseMoE(6, 3, num_experts=4, expert_width=5))
    batch = torch.randn(20, 6), torch.randint(3, (20,))
    with untouched(model):
        result = perturbation_sharpness(model, cross_entropy, [batch])
    assert 0 < result.sam <= result.worst
    assert 0 < result.average_stderr < math.inf


def test_losses_that_take_a_gradient_themselves() -> None:
    def penalty(model: Weights, batch: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(model.w.pow(3).sum(), model.w, create_graph=True)
        return gradient.sum()  # 3 w²

    result = perturbation_sharpness(Weights(2.0), penalty, [ONE], radius=0.5, num_draws=200)
    assert result.worst == pytest.approx(3 * 9 - 3 * 4)
    assert result.average == pytest.approx(3 * 0.1**2 * 4, abs=4 * result.average_stderr)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_losses_that_are_not_finite_stay_so(value: float) -> None:
    def loss(model: Weights, batch: Tensor) -> Tensor:
        return torch.where(model.w > 1.3, value, model.w).sum()

    result = perturbation_sharpness(Weights(1.0), loss, [ONE], average_radius=1.0, radius=0.5)
    assert [str(result.sam), str(result.worst)] == [str(value)] * 2
    assert not math.isfinite(result.average)
    assert result.num_gradients == 2  # the ascent has ended
    assert result.num_nonfinite > 2
    assert {"average", "worst", "sam"}.isdisjoint(result.metrics())
    assert f"At {result.num_nonfinite} perturbed points the loss is nan or inf." in result.summary()


def test_a_nan_in_the_ascent_is_not_lost() -> None:
    gradients = itertools.count(1)

    def loss(model: Weights, batch: Tensor) -> Tensor:
        spoilt = torch.is_grad_enabled() and next(gradients) == 4  # the first is the center of the average case
        return model.w.sum() * (math.nan if spoilt else 1)

    result = perturbation_sharpness(Weights(1.0), loss, [ONE], radius=0.5)
    assert result.sam == pytest.approx(0.5)
    assert math.isnan(result.worst)
    assert (result.num_gradients, result.num_nonfinite) == (3, 1)


def test_a_model_of_zeros_cannot_move() -> None:
    result = perturbation_sharpness(Weights(0.0, 0.0), linear(torch.ones(2, dtype=torch.float64)), [ONE])
    assert result.average == result.average_stderr == result.sam == result.worst == 0
    assert result.num_fixed == 2


def test_default_radii() -> None:
    found = {}
    for norm, adaptive in itertools.product(("l2", "linf"), (True, False)):
        loss = quadratic(torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        result = perturbation_sharpness(Weights(1.0), loss, [ONE], norm=norm, adaptive=adaptive, num_draws=2)
        found[norm, adaptive] = (result.radius, result.average_radius)
    assert found == {
        ("l2", True): (0.5, 0.1),
        ("l2", False): (0.05, 0.01),
        ("linf", True): (0.001, 0.1),
        ("linf", False): (0.0005, 0.01),
    }


def test_report() -> None:
    model, batch = relu_network()
    result = perturbation_sharpness(model, cross_entropy, [batch], norm="linf", radius=0.01)
    metrics = result.metrics()
    assert metrics["worst"] == result.worst
    assert metrics["worst_curvature"] == 2 * result.worst / 0.01**2
    assert "partial" not in metrics
    summary = result.summary()
    assert r"c = \|w\|" in summary
    assert f"| worst case found | {result.worst:.5g} | ‖u‖∞ ≤ 0.01 |" in summary
    assert "Partial" not in summary
    # every row has as many cells as the header
    assert {line.replace(r"\|", "").count("|") for line in summary.splitlines()} == {4}


@pytest.mark.parametrize(("calls", "draws", "gradients"), [(1, 0, 0), (9, 3, 0), (43, 20, 1), (45, 20, 3)])
def test_partial_when_the_time_is_over(calls: int, draws: int, gradients: int) -> None:
    model, batch = relu_network()
    shown: list[tuple[int, int | None]] = []
    # the time limit passes when the loss says so
    progress = Progress(max_time=1.0, show=lambda done, total, quantities: shown.append((done, total)))
    progress._deadline = math.inf
    count = itertools.count(1)

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        if next(count) == calls:
            progress._deadline = -math.inf
        return cross_entropy(m, b)

    with untouched(model):
        result = perturbation_sharpness(model, loss, [batch], progress=progress)
    assert result.partial == "max_time = 1.0 s was over"
    assert (result.num_draws, result.num_gradients) == (draws, gradients)
    assert shown == [(done, 43) for done in range(1, 2 + draws + gradients)]
    assert math.isnan(result.average) == (draws == 0)
    assert math.isnan(result.worst) == (gradients < 2)
    assert ("The worst case was not computed." in result.summary()) == (gradients < 2)
    assert "**Partial**: max_time = 1.0 s was over." in result.summary()
    assert result.metrics()["partial"] == 1


def test_no_time_for_the_center() -> None:
    model, batch = relu_network()
    with pytest.raises(TimeUp, match="before there was a result"):
        perturbation_sharpness(model, cross_entropy, [batch], progress=Progress(max_time=1e-9))


class Unreadable:
    """Batches that must not be read."""

    def __iter__(self) -> Any:
        raise AssertionError("the data was read")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0}, "radius: expected a finite number above 0 or None, got 0"),
        ({"radius": math.inf}, "radius: expected a finite number above 0 or None, got inf"),
        ({"radius": math.nan}, "radius: expected a finite number above 0 or None, got nan"),
        ({"radius": True}, "radius: expected a finite number above 0 or None, got True"),
        ({"average_radius": -0.1}, "average_radius: expected a finite number above 0 or None, got -0.1"),
        ({"average_radius": "0.1"}, "average_radius: expected a finite number above 0 or None, got '0.1'"),
        ({"adaptive": 1}, "adaptive: expected True or False, got 1"),
        ({"norm": "l1"}, "norm: expected one of 'l2', 'linf', got 'l1'"),
        ({"num_draws": 1}, "num_draws: expected an integer of at least 2, got 1"),
        ({"num_draws": 2.0}, r"num_draws: expected an integer of at least 2, got 2\.0"),
        ({"num_steps": -1}, "num_steps: expected an integer of at least 0, got -1"),
        ({"seed": 0.5}, r"seed: expected an int from .* got 0\.5"),
        ({"params": []}, "params: expected at least one parameter, got none"),
        ({"params": [torch.ones(1)]}, "params: expected parameters of the model that require a gradient"),
    ],
)
def test_bad_options_are_refused_before_the_data_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perturbation_sharpness(nn.Linear(1, 1), lambda m, b: m(b).sum(), Unreadable(), **options)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b), r"loss_fn: expected a scalar tensor, the mean loss of batch 0, got shape \(4, 1\)"),
        (lambda m, b: 1.0, "loss_fn: expected a scalar tensor, the mean loss of batch 0, got float"),
        (
            lambda m, b: m(b).mean() / (b.sum() - 8),
            "loss_fn: expected a finite loss of the model as it is, got -?inf as the loss of batch 1",
        ),
        (
            lambda m, b: (m(b).mean() * (b.sum() - 8)).square().sqrt(),
            "loss_fn: expected a finite gradient, got nan or inf in that of batch 1",
        ),
        (
            lambda m, b: b.sum(),
            "loss_fn: expected a loss that depends on the model's parameters, got one for batch 0 that does not",
        ),
    ],
)
def test_bad_losses(loss: Any, message: str) -> None:
    model = nn.Linear(1, 1)
    with untouched(model), pytest.raises(ValueError, match=message):
        perturbation_sharpness(model, loss, [torch.ones(4, 1), torch.full((4, 1), 2.0)])


def test_no_data() -> None:
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        perturbation_sharpness(nn.Linear(1, 1), cross_entropy, [])


def on_rank(rank: int) -> dict[str, Any]:
    ranks = Ranks(dist.group.WORLD, "test")
    model, (x, y) = relu_network()
    mine = [(x[:4], y[:4])] if rank == 0 else [(x[4:6], y[4:6]), (x[6:], y[6:])]
    found: dict[str, Any] = {
        norm: perturbation_sharpness(model, cross_entropy, mine, norm=norm, ranks=ranks) for norm in ("l2", "linf")
    }
    # The time of rank zero ends during an evaluation of the ascent. Both ranks get the partial result.
    progress = Progress(max_time=1.0)
    progress._deadline = math.inf
    count = itertools.count(1)

    def slow(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        # three calls compare the batch with its halves
        if next(count) == 3 + 44 and rank == 0:
            progress._deadline = -math.inf
        return cross_entropy(m, b)

    found["partial"] = perturbation_sharpness(model, slow, mine, progress=progress, ranks=ranks)

    def fails(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(m, b) / (rank == 0 or 0.0)

    try:
        perturbation_sharpness(model, fails, mine, ranks=ranks)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    model, batch = relu_network()
    zero, one = run_on_ranks(on_rank, tmp_path)
    for norm in ("l2", "linf"):
        alone = perturbation_sharpness(model, cross_entropy, [batch], norm=norm)
        assert zero[norm] == one[norm]
        assert values_of(zero[norm]) == pytest.approx(values_of(alone), rel=1e-9)
        assert zero[norm].num_samples == 15
    assert zero["partial"] == one["partial"]
    assert zero["partial"].partial
    assert (zero["partial"].num_gradients, zero["partial"].sam) == (2, zero["l2"].sam)
    assert one["error"].startswith("ValueError: loss_fn: expected a finite loss of the model as it is, got inf")
    assert zero["error"].startswith("RankError: rank 1: ValueError: loss_fn: expected a finite loss")
