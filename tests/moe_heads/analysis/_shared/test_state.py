"""Containers and tensors come back as the same objects with the same contents."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics import MeanMetric

from moe_heads.analysis._shared.state import snapshot, write_back


@pytest.mark.parametrize(
    ("value", "wreck"),
    [
        ([1, 2], lambda v: v.append(3)),
        ([1, [2]], lambda v: v[1].clear()),
        ({"a": {"b": [1]}}, lambda v: v["a"]["b"].append(2)),
        ({"a": 1}, lambda v: v.update(b=2)),
        (OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
        (defaultdict(list, a=[1]), lambda v: v["b"].append(1)),
        (Counter(a=2), lambda v: v.update("ab")),
        (deque([1, 2], maxlen=2), lambda v: v.append(3)),
        ({1, 2}, lambda v: v.discard(1)),
        (([1],), lambda v: v[0].append(2)),
    ],
)
def test_a_container_gets_its_contents_back(value: Any, wreck: Any) -> None:
    before = repr(value)
    put_back = snapshot(value)
    wreck(value)
    assert repr(value) != before
    assert put_back() is value
    assert repr(value) == before


def test_a_tensor_gets_its_bits_back_and_keeps_its_identity() -> None:
    hidden = (torch.tensor([1.0, float("nan")]), torch.zeros(2))
    put_back = snapshot(hidden)
    hidden[0].zero_()
    hidden[1].add_(1)
    assert put_back() is hidden
    assert hidden[0].isnan().tolist() == [False, True]
    assert hidden[1].tolist() == [0, 0]


def test_a_container_that_holds_itself_is_followed_once() -> None:
    value: list[Any] = [1]
    value.append(value)
    put_back = snapshot(value)
    value.append(2)
    put_back()
    assert len(value) == 2
    assert value[1] is value


def test_other_objects_and_known_ones_keep_their_reference_only() -> None:
    class Counter:
        count = 0

    counter, parameter = Counter(), torch.zeros(1)
    put_back = snapshot([counter, parameter], known={id(parameter)})
    counter.count = 5
    parameter.add_(1)
    assert put_back()[0].count == 5
    assert parameter.item() == 1


def test_arrays_generators_and_modules_outside_the_tree_come_back() -> None:
    metric = MeanMetric()
    metric.update(1.0)
    held: dict[str, Any] = {
        "array": np.arange(3.0),
        "torch": torch.Generator().manual_seed(1),
        "numpy": np.random.default_rng(1),
        "python": random.Random(1),
        "metrics": [metric],
    }
    put_back = snapshot(held)
    draws = {
        "torch": lambda: torch.rand(1, generator=held["torch"]).item(),
        "numpy": lambda: held["numpy"].random(),
        "python": lambda: held["python"].random(),
    }
    first = {name: draw() for name, draw in draws.items()}
    held["array"] += 1
    metric.update(5.0)
    put_back()
    assert held["array"].tolist() == [0, 1, 2]
    assert metric.compute() == 1
    assert {name: draw() for name, draw in draws.items()} == first


def test_tensors_of_inference_mode_and_expanded_ones_can_be_written_back() -> None:
    with torch.inference_mode():
        state = torch.zeros(2)
        put_back = snapshot([state])
        state.add_(1)
    put_back()
    assert state.tolist() == [0, 0]
    expanded = torch.zeros(2, 1).expand(2, 3)
    values = torch.tensor([[1.0], [2.0]]).expand(2, 3).clone()
    write_back(expanded, values)
    assert torch.equal(expanded, values)
