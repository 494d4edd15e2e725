import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import (
    DirectionSweepResult,
    Progress,
    direction_sweep,
    filter_normalized,
    layer_normalized,
    loss_landscape,
    normalized_random_direction,
    random_direction,
)
from tests.support.untouched import untouched

pytestmark = pytest.mark.usefixtures("without_mean_check")


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (torch.randn(12, 4), torch.randint(3, (12,)))


def test_every_direction_is_a_line_of_its_own() -> None:
    model, batch = problem()
    with untouched(model):
        sweep = direction_sweep(model, cross_entropy, [batch], num_directions=3, num_points=5, seed=2)
    for number, row in enumerate(sweep.losses):
        direction = filter_normalized(model, random_direction(model, seed=2 * 3 + number))
        line = loss_landscape(model, cross_entropy, [batch], direction1=direction, alphas=sweep.alphas)
        assert torch.equal(line.losses, row)
    assert sweep.losses[:, 2].tolist() == [sweep.center_loss] * 3
    assert sweep.routing_flips is None and sweep.losses_fixed_routing is None


def test_band_and_spread_of_a_quadratic() -> None:
    """|θ + α d|² with |d| = |θ| = 1: 1 + 2 α c + α², c the cosine; the curvature is 2 for all."""
    model = nn.Linear(1, 40, bias=False).double()
    model.weight.data.copy_(nn.functional.normalize(torch.randn(40, 1, dtype=torch.float64), dim=0))
    options: dict[str, Any] = {"num_directions": 200, "num_points": 3, "normalization": "none"}
    sweep = direction_sweep(model, lambda m, b: m(b).square().sum(), [torch.ones(1, 1).double()], **options)
    metrics = sweep.metrics()
    assert metrics["curvature"] == pytest.approx(2)
    assert metrics["curvature_stderr"] == pytest.approx(0, abs=1e-9)
    cosines = (sweep.losses[:, 2] - sweep.losses[:, 0]) / 4
    # the cosine of two random directions has mean 0 and variance 1/P
    assert abs(cosines.mean()) < 4 * 40**-0.5 / 200**0.5
    assert cosines.std() == pytest.approx(40**-0.5, rel=0.3)
    assert sweep.stderr[2] == pytest.approx(2 * float(cosines.std()) / 200**0.5)
    assert (sweep.losses[:, 2] < sweep.quantile(0.1)[2]).double().mean() == pytest.approx(0.1, abs=0.01)
    assert metrics["end_loss"] == pytest.approx(2)


@pytest.mark.parametrize("normalization", ["filter", "layer", "none"])
def test_normalizations(normalization: Any) -> None:
    model, _ = problem()
    found = normalized_random_direction(
        model, 3, normalization, biases="normalized" if normalization != "none" else "zero"
    )
    raw = random_direction(model, 3)
    if normalization == "none":
        torch.testing.assert_close(found, raw / raw.norm())
    else:
        scale = {"filter": filter_normalized, "layer": layer_normalized}[normalization]
        assert torch.equal(found, scale(model, raw, biases="normalized"))


def test_radii_within_reach() -> None:
    axis = (torch.arange(21, dtype=torch.float64) - 10) / 10
    losses = 1 + torch.stack([axis.square(), 0.1 * axis.square()])
    sweep = DirectionSweepResult(axis, losses, None, None, 1.0, 8, 0)
    assert sweep.radii(0.5) == (pytest.approx(0.7071, abs=3e-3), math.inf)
    assert "radius_50" not in sweep.metrics()
    assert sweep.metrics()["curvature"] == pytest.approx(1.1)


def test_features_are_kept_over_all_directions() -> None:
    model, batch = problem()
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda *args: None)  # not inside of what is kept, so allowed
    forward = model[0].forward
    model[0].forward = lambda x: calls.append(1) or forward(x)
    direction_sweep(model, cross_entropy, [batch], num_directions=4, num_points=5, params=["2"])
    assert len(calls) == 2 + 4  # the center with a graph and without, and a proof for each direction
    handle.remove()


def test_time_ends_it_after_whole_directions() -> None:
    model, batch = problem()

    def show(done: int, total: int | None, quantities: Any) -> None:
        if done == 1 + 4 + 2 * 3:  # the center, the ends of all, the rest of two
            progress._deadline = 0.0

    progress = Progress(max_time=100, show=show)
    sweep = direction_sweep(model, cross_entropy, [batch], num_directions=4, num_points=5, progress=progress)
    assert len(sweep.losses) == 2
    assert sweep.num_unmeasured == 2
    assert "**Partial**" in sweep.summary() and sweep.metrics()["partial"] == 1


def test_nonfinite_losses_are_reported() -> None:
    model, batch = problem()
    start = model[0].weight.detach().clone()

    def loss(m: nn.Module, b: Any) -> Tensor:
        distance = (m[0].weight.detach() - start).norm()
        return cross_entropy(m, b) + torch.where(distance > 0.9 * start.norm(), math.nan, 0.0)

    sweep = direction_sweep(model, loss, [batch], num_directions=3, num_points=5)
    assert sweep.num_nonfinite == sweep.metrics()["num_nonfinite"] == 6
    assert "6 points have a loss of nan or inf" in sweep.summary()
    assert "6 points not finite" in sweep.plot()[1].get_title()
    assert 0 < sweep.metrics()["relative_spread"] < 10  # of the steps where all are finite
    assert direction_sweep(model, cross_entropy, [batch], num_directions=3).metrics()["num_nonfinite"] == 0


def test_figure_summary_and_arrays(tmp_path: Any) -> None:
    model, batch = problem()
    sweep = direction_sweep(model, cross_entropy, [batch], num_directions=3, num_points=5)
    figure, ax = sweep.plot()
    figure.canvas.draw()
    assert ax.get_title() == "3 random directions (12 samples)"
    assert sweep.summary().startswith("| quantity | value |")
    sweep.save(tmp_path / "sweep.npz")
    with np.load(tmp_path / "sweep.npz") as stored:
        assert np.array_equal(stored["losses"], sweep.losses.numpy())


def test_whole_numbers_of_numpy() -> None:
    model, batch = problem()
    one, other = (
        direction_sweep(model, cross_entropy, [batch], num_directions=number, num_points=np.int64(3), seed=2)
        for number in (2, np.int64(2))
    )
    assert torch.equal(one.losses, other.losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 1}, "num_directions: expected an integer of at least 2, got 1"),
        ({"num_points": 1}, "num_points: expected an integer of at least 2, got 1"),
        ({"num_points": 2.5}, r"num_points: .* got 2\.5"),
        ({"num_directions": True}, "num_directions: expected an integer of at least 2, got True"),
        ({"seed": 0.5}, r"seed: expected an int from 0 to .* got 0\.5"),
        ({"reach": -1.0}, "reach: expected a finite number above 0, got -1.0"),
        ({"normalization": "weight"}, "normalization: expected one of 'filter', 'layer', 'none', got 'weight'"),
        ({"biases": "kept"}, "biases: expected one of 'zero', 'normalized', got 'kept'"),
        ({"loss_fn": lambda m, b: m(b[0]).sum() / 0}, "loss_fn: expected a finite loss of the given model"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    model, batch = problem()
    with pytest.raises(ValueError, match=message):
        direction_sweep(model, **({"loss_fn": cross_entropy, "batches": [batch]} | options))
