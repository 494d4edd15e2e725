import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moe_heads.analysis import read_states, trajectory_plane
from moe_heads.analysis.loss_landscape import trajectory as module
from moe_heads.analysis.loss_landscape.trajectory import WeightHistory


def test_principal_plane_of_a_dense_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 7)  # pieces that do not divide the parameters
    model = nn.Linear(9, 4).double()
    here = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    steps = torch.randn(6, 40, dtype=torch.float64) * torch.linspace(1, 5, 6, dtype=torch.float64)[:, None]
    plane = trajectory_plane(model, list(here + steps), labels=[f"e{i}" for i in range(6)])
    _, values, right = torch.linalg.svd(steps, full_matrices=False)
    run = plane.trajectory
    assert run.explained_variance == pytest.approx((values[:2].square() / values.square().sum()).tolist())
    for found, expected in zip((plane.direction1, plane.direction2), right, strict=False):
        assert abs(float(found @ expected)) == pytest.approx(1)
    off = steps - run.coordinates @ torch.stack([plane.direction1, plane.direction2])
    torch.testing.assert_close(run.residuals, off.norm(dim=1))
    torch.testing.assert_close(run.distances, steps.norm(dim=1))
    assert run.labels == ("e0", "e1", "e2", "e3", "e4", "e5")


def test_state_dicts_and_parts_of_them() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    states = [nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).state_dict() for _ in range(3)]
    flat = [torch.cat([state["1.weight"].reshape(-1), state["1.bias"]]) for state in states]
    one, other = (trajectory_plane(model, given, params=["1"]) for given in (states, flat))
    assert one.direction1.shape == (6,)
    assert torch.equal(one.trajectory.coordinates, other.trajectory.coordinates)


def test_a_folder_of_checkpoints_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name, step in (("epoch=2", 30), ("epoch=10", 110), ("last", 110), ("epoch=1", 20)):
        torch.save({"global_step": step, "state_dict": {"weight": torch.full((1,), step)}}, tmp_path / f"{name}.ckpt")
    states = read_states(tmp_path)
    assert [int(state["weight"]) for state in states.values()] == [20, 30, 110]
    assert list(states)[:2] == ["epoch=1.ckpt", "epoch=2.ckpt"]
    for number in (10, 9):
        torch.save({"weight": torch.full((1,), number)}, tmp_path / f"weights{number}.pt")
    assert [int(state["weight"]) for state in read_states(tmp_path, "*.pt").values()] == [9, 10]
    with pytest.raises(ValueError, match=r"folder: expected files '\*.pth', got none in"):
        read_states(tmp_path, "*.pth")


@pytest.mark.parametrize(
    ("states", "labels", "message"),
    [
        ([torch.ones(3)], None, "states: expected at least two, got 1"),
        (
            [torch.ones(3), torch.ones(4)],
            None,
            r"states: expected \(3,\) finite numbers in each, got others in state 1",
        ),
        ([torch.full((3,), math.nan), torch.ones(3)], None, r"states: expected .* got others in state 0"),
        ([{"weight": torch.ones(1, 3)}, {}], None, r"states: expected .*'weight' in each, .* got state 1 without it"),
        ([torch.ones(3), 2 * torch.ones(3)], None, "states: expected .* not on a line through the model, got a line"),
        ([torch.zeros(3), torch.zeros(3)], None, "states: expected .* got a line"),
        ([torch.ones(3), torch.eye(3)[0]], ["a"], "labels: expected one for each of 2 states, got 1"),
    ],
)
def test_bad_input(states: Any, labels: Any, message: str) -> None:
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match=message):
        trajectory_plane(model, states, labels=labels)


def test_rounding_is_not_mistaken_for_a_residual() -> None:
    model = nn.Linear(1000, 1, bias=False)
    nn.init.zeros_(model.weight)
    basis = torch.linalg.qr(torch.randn(1000, 2)).Q.T
    states = [torch.tensor([np.cos(t), np.sin(t)], dtype=torch.float32) @ basis for t in range(4)]
    run = trajectory_plane(model, states).trajectory
    assert run.residuals.max() < 1e-5 * run.distances.max()


def test_a_history_does_not_copy_constant_parameters() -> None:
    model, history = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), WeightHistory(None)
    history.record("start", model)
    with torch.no_grad():
        model[1].weight.add_(1)
    history.record("end", model)
    first, last = history._states.values()
    assert [first[name] is last[name] for name in first] == [True, True, False, True]
    with torch.no_grad():
        model[0].weight.zero_()
    assert bool(first["0.weight"].any())


def test_a_history_omits_parameters_that_are_added_later() -> None:
    model, history = nn.Sequential(nn.Linear(2, 2)), WeightHistory(None)
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        if step == 1:
            model.append(nn.Linear(2, 1))
        history.record(str(step), model)
    assert history.common_parameters(model) == ["0.weight", "0.bias"]
    assert history.omitted_parameters(model) == ["1.weight", "1.bias"]
    assert len(history.plane(model).direction1) == 6
    model[0].requires_grad_(False)
    with pytest.raises(
        ValueError, match="states: expected a trainable parameter that existed at all moments, got none"
    ):
        history.plane(model)


def test_a_history_stores_a_shared_parameter_by_any_of_its_names() -> None:
    model, history = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), WeightHistory(["1"])
    model[1].weight = model[0].weight
    history.record("start", model)
    assert list(history._states["start"]) == ["0.weight", "1.bias"]
