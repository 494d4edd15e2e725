"""Sharpness along the steps of a training: its values, its cost, its checks, and a training that does not notice it."""

import importlib
import math
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from moe_heads.analysis import sharpness
from moe_heads.callbacks import CriticalSharpnessCallback, SharpnessCallback, TrainingMonitor
from moe_heads.callbacks._intermittent_checks import IntermittentChecks
from tests.support.events import read_events
from tests.support.hessians import classification, cross_entropy, small_mlp

OPTIONS: dict[str, Any] = {
    "num_eigenvalues": 1,
    "trace": False,
    "density": False,
    "splits": ["train"],
    "on_error": "raise",
}


class Scaled(nn.Module):
    """The quadratic form a·x² / 2 of each parameter, with a that grows along the training."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.register_buffer("a", torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

    def forward(self, batch: Tensor) -> Tensor:
        return (self.a * self.x.square()).sum() / 2 + 0 * batch.sum()


def trained(
    model: nn.Module, batch: Any, loss_fn: Any, *analyses: Any, num_steps: int, after: Any = None
) -> TrainingMonitor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = TrainingMonitor(analyses, loss_fn=loss_fn)
    monitor.start(model, optimizer, train=[batch])
    for step in range(1, num_steps + 1):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        monitor.step(model, batch)
        if after is not None:
            after(step)
    return monitor


def test_known_eigenvalues_of_a_quadratic_that_another_one_overtakes() -> None:
    """The warm start is the eigenvector of the third parameter, and the first one overtakes it."""
    model = Scaled()

    def after(step: int) -> None:
        with torch.no_grad():
            model.a[0] = step + 1.0

    callback = SharpnessCallback(every_n_train_steps=1, **OPTIONS)
    trained(model, torch.ones(4, 1, dtype=torch.float64), lambda m, b: m(b), callback, num_steps=5, after=after)
    points = callback.tracked_steps["train"]
    assert [point["lambda_max"] for point in points.values()] == pytest.approx([3, 3, 3, 4, 5], rel=1e-6)
    assert all(point["converged"] == 1 for point in points.values())
    assert all(point["stability_threshold"] == pytest.approx(40) for point in points.values())


def test_every_point_equals_a_fresh_analysis_and_states_its_checks() -> None:
    model, batch = small_mlp(), classification(20, 5)
    fresh, summaries = {}, {}
    callback = SharpnessCallback(every_n_train_steps=4, check_every_n_points=3, **OPTIONS)

    def after(step: int) -> None:
        if step % 4 == 0:
            fresh[step] = sharpness(model, cross_entropy, [batch], num_eigenvalues=1, density=False, trace=False)
            summaries[step] = callback.results["train"].summary()

    monitor = trained(model, batch, cross_entropy, callback, num_steps=16, after=after)
    points = callback.tracked_steps["train"]
    assert list(points) == list(fresh) == [4, 8, 12, 16]
    for step, point in points.items():
        assert point["lambda_max"] == pytest.approx(fresh[step].eigenvalues[0], rel=1e-5)
        assert point["converged"] == 1 and point["num_products"] <= fresh[step].num_products + 5
        assert not [name for name in point if "trace" in name]
    assert ["derivative_error" in point for point in points.values()] == [True, False, False, True]
    assert "not checked" not in summaries[4] + summaries[16]
    reason = "not checked: made at step 4, and at every 3 points"
    assert summaries[8].count(reason) == summaries[12].count(reason) == 4
    # the last point had the checks, so that the end of fit is the same result
    final = callback.results["train"]
    assert monitor.end(model)["sharpness"]["train"].eigenvalues == final.eigenvalues


def test_the_end_of_fit_makes_the_checks_that_the_last_point_left_out() -> None:
    model, batch = small_mlp(), classification(20, 5)
    callback = SharpnessCallback(every_n_train_steps=2, **OPTIONS)
    monitor = trained(model, batch, cross_entropy, callback, num_steps=4)
    last = callback.results["train"]
    assert IntermittentChecks.are_left_out_of(last)
    final = monitor.end(model)["sharpness"]["train"]
    assert not IntermittentChecks.are_left_out_of(final) and final.converged
    assert final.eigenvalues[0] == pytest.approx(last.eigenvalues[0], rel=1e-6)


def detached(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose gradient lacks a part."""
    hidden = model[:2](batch[0])
    return F.cross_entropy(model[2](hidden), batch[1]) + (hidden.detach().square() * hidden).mean()


@pytest.mark.filterwarnings(
    "ignore:sharpness/train. The gradient is not", "ignore:sharpness/train. The products are not"
)
def test_a_failed_check_is_repeated_at_every_point() -> None:
    callback = SharpnessCallback(every_n_train_steps=1, **OPTIONS)
    trained(small_mlp(), classification(20, 5), detached, callback, num_steps=3)
    points = callback.tracked_steps["train"].values()
    assert all(point["derivative_error"] > 0.01 and point["converged"] == 0 for point in points)


def test_the_training_is_bit_for_bit_that_without_it() -> None:
    def run(*analyses: Any) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)).double()
        batch = classification(20, 5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        monitor = TrainingMonitor(analyses, loss_fn=cross_entropy) if analyses else None
        if monitor is not None:
            monitor.start(model, optimizer, train=[batch])
        for _ in range(6):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
            if monitor is not None:
                monitor.step(model, batch)
        return [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())], torch.get_rng_state()

    used = SharpnessCallback(every_n_train_steps=2, **OPTIONS), CriticalSharpnessCallback(3, fraction=0.5)
    plain, analyzed = run(), run(*used)
    assert all(map(torch.equal, plain[0], analyzed[0])) and torch.equal(plain[1], analyzed[1])
    assert len(used[0].tracked_steps["train"]) == 3 and len(used[1].tracked_steps["train"]) == 2


def test_cost_and_figure_at_the_end(tmp_path: Any) -> None:
    model, batch = small_mlp(), classification(20, 5)
    writer = SummaryWriter(str(tmp_path))
    callback = SharpnessCallback(every_n_train_steps=2, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = TrainingMonitor([callback], loss_fn=cross_entropy, writer=writer)
    monitor.start(model, optimizer, train=[batch])
    for _ in range(4):
        cross_entropy(model, batch).backward()
        optimizer.step()
        monitor.step(model, batch)
    monitor.end(model)
    writer.close()
    products = [point["num_products"] for point in callback.tracked_steps["train"].values()]
    assert monitor.metrics["sharpness/step/products_mean"] == pytest.approx(sum(products) / 2)
    assert monitor.metrics["sharpness/step/products_max"] == max(products)
    assert monitor.metrics["sharpness/step/overhead"] > 0 and monitor.metrics["sharpness/step/seconds_min"] > 0
    events = read_events(tmp_path)
    assert "sharpness/step/tracking" in events.Tags()["images"]


def test_a_smaller_point_has_no_trace() -> None:
    callback = SharpnessCallback(num_eigenvalues=1, density=False, max_overhead=0.5, loss_fn=cross_entropy)
    model, batch = nn.Linear(5, 3).double(), classification(20, 5)
    assert math.isfinite(callback.analyze(model, train=[batch])["train"].trace)
    assert callback._budget is not None
    callback._budget.level, callback.is_step_point = 1, True
    assert math.isnan(callback.analyze(model, train=[batch])["train"].trace)


def test_more_eigenvalues_than_memory_raise_an_error_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("moe_heads.analysis.sharpness.hessian.lanczos")
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    callback = SharpnessCallback(every_n_train_steps=2, **OPTIONS)
    model = small_mlp()
    with pytest.raises(MisconfigurationException, match="SharpnessCallback: there is no memory for one eigenvalue"):
        TrainingMonitor([callback], loss_fn=cross_entropy).start(model, torch.optim.SGD(model.parameters(), lr=0.05))


@pytest.mark.parametrize("every", [0, 1.5, None])
def test_bad_number_of_points_between_checks(every: Any) -> None:
    with pytest.raises(ValueError, match="check_every_n_points: expected an integer of at least 1, got"):
        SharpnessCallback(check_every_n_points=every)


def test_the_eigenvalue_needs_no_update_direction() -> None:
    """LBFGS, and two optimizers, are errors for the critical sharpness only; see test_critical_sharpness."""
    model, batch = small_mlp(), classification(20, 5)
    callback = SharpnessCallback(every_n_train_steps=1, **OPTIONS)
    monitor = TrainingMonitor([callback], loss_fn=cross_entropy)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        return loss

    monitor.start(model, optimizer, train=[batch])
    optimizer.step(closure)
    monitor.step(model, batch)
    assert "stability_threshold" not in callback.tracked_steps["train"][1]
