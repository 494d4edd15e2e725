"""Wrong types raise an error that names the argument, in every analysis and before it does any work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis import (
    Progress,
    analysis_mode,
    direction_sweep,
    expert_utilization,
    filter_normalized,
    inference_timing,
    loss_landscape,
    perturbation_sharpness,
    random_direction,
    routing_response,
    sharpness,
    trajectory_plane,
)
from moe_heads.analysis._shared.arguments import check_arguments
from tests.support.hessians import cross_entropy

BATCHES = [(torch.zeros(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))]
RIGHT: dict[str, Any] = {"model": SparseMoE(4, 3, num_experts=2), "loss_fn": cross_entropy, "batches": BATCHES}
DIRECTION = torch.ones_like(random_direction(RIGHT["model"]))

ANALYSES: dict[Callable[..., Any], dict[str, Any]] = {
    sharpness: RIGHT,
    perturbation_sharpness: RIGHT,
    loss_landscape: {**RIGHT, "direction1": DIRECTION},
    direction_sweep: RIGHT,
    routing_response: {**RIGHT, "direction": DIRECTION, "steps": [1.0]},
    expert_utilization: {"model": RIGHT["model"], "batches": BATCHES},
}

WRONG: dict[Callable[..., Any], dict[str, list[Any]]] = {
    sharpness: {
        "blocks": [3, {"a": "weight"}, {1: ["weight"]}],
        "routing_steps": [0.1, [0.1, 0.1], [-1], ["a"]],
        "graph_memory": [-1, "1 GiB"],
        "basis_memory": [1.5],
        "start": ["v"],
        "params": ["gate", 3],
        "density": ["yes"],
    },
    perturbation_sharpness: {"radius": ["a"], "norm": ["l1"], "num_draws": [1]},
    loss_landscape: {
        "direction1": [3, "d"],
        "alphas": [["a"], 3, object()],
        "accuracy_fn": [3],
        "fixed_routing": ["yes"],
        "resume": [3],
        "trajectory": [3],
    },
    direction_sweep: {"alphas": [["a"]], "fixed_routing": ["yes"], "normalization": ["units"]},
    routing_response: {"steps": [["a"], 3], "direction": [3]},
    expert_utilization: {
        "num_classes": [0, 2.0],
        "class_names": ["cat"],
        "forward_fn": [None, 3],
        "label_fn": [None],
        "adapters": [3],
    },
}


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda analysis: str(analysis.__name__))
def test_arguments_that_analyses_share(analysis: Callable[..., Any]) -> None:
    right = ANALYSES[analysis]
    shared: dict[str, list[Any]] = {
        "model": [3, lambda x: x, None],
        "batches": [3, "x", None, [], BATCHES[0]],
        "seed": [-1, 0.5, "a"],
        "progress": [3],
        "ranks": [3],
        "batch_size_fn": [3],
    }
    if "loss_fn" in right:
        shared |= {"loss_fn": [3, None], "batch_weight_fn": [3]}
    for name, values in (shared | WRONG[analysis]).items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name}.*: expected .*, got"):
                analysis(**{**right, name: value})


def test_arguments_of_inference_timing() -> None:
    wrong: dict[str, list[Any]] = {"model": [3], "forward_fn": [3], "modules": ["head", 3], "progress": [3]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}: expected .*, got"):
                inference_timing(**{"model": nn.Linear(4, 2), "example_batch": torch.zeros(2, 4), name: value})


def test_arguments_of_directions_and_contexts() -> None:
    model: Any = 3
    vector: Tensor = torch.ones(3)
    calls: list[Callable[[], object]] = [
        lambda: random_direction(model),
        lambda: filter_normalized(model, vector),
        analysis_mode(model).__enter__,
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^model: expected a torch\.nn\.Module, got 3"):
            call()
    states: Any = 3
    with pytest.raises(ValueError, match=r"^states: expected a list of state dicts or flat tensors, got 3"):
        trajectory_plane(nn.Linear(2, 1), states)
    show: Any = 3
    with pytest.raises(ValueError, match=r"^show: expected a function or None, got 3"):
        Progress(show=show)


def test_none_is_accepted_where_it_is_the_default() -> None:
    check_arguments(progress=None, ranks=None, batch_size_fn=None, batch_weight_fn=None, accuracy_fn=None)
