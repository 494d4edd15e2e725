"""The same callbacks in a second training: its numbers alone, and nothing of the first."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_heads import SparseMoE
from moe_heads.callbacks import (
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from tests.support.lightning_models import NUM_CLASSES, PlainModule, loader, trainer


class Other(PlainModule):
    """Another number of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SparseMoE(8, NUM_CLASSES, num_experts=6, expert_width=4, balance=None)


FAST: dict[str, Any] = {"density": False, "num_eigenvalues": 1, "trace_tolerance": 0.9, "routing_steps": ()}

CALLBACKS: dict[str, Callable[[], FitEndAnalysis]] = {
    "sharpness": lambda: SharpnessCallback(
        every_n_epochs=1,
        every_n_train_steps=2,
        num_samples=20,
        density=False,
        num_eigenvalues=1,
        trace_tolerance=0.9,
        routing_steps=(),
        splits=["train"],
    ),
    "expert_utilization": lambda: ExpertUtilizationCallback(every_n_train_steps=2, splits=["train"], warn=False),
    "loss_landscape": lambda: LossLandscapeCallback(
        every_n_epochs=1, trajectory=True, plane_points=3, line_points=3, num_samples=20, splits=["train"]
    ),
    "inference_timing": lambda: InferenceTimingCallback(
        batch_sizes=(1,), num_runs=2, seconds_per_size=0.01, splits=["train"]
    ),
}


def module(cls: type[PlainModule]) -> PlainModule:
    torch.manual_seed(0)
    return cls()


def state_of(callback: FitEndAnalysis) -> dict[str, Any]:
    """The numbers of a callback after a fit."""
    found: dict[str, Any] = {"tracked": callback.tracked, "tracked_steps": callback.tracked_steps}
    if isinstance(callback, ExpertUtilizationCallback):
        for name, history in (("epochs", callback.history), ("steps", callback.history_steps)):
            found[name] = {
                head: {at: stats.counts.tolist() for at, stats in own.items()} for head, own in history.items()
            }
    if not isinstance(callback, InferenceTimingCallback):
        found["results"] = {split: callback.report(result).metrics for split, result in callback.results.items()}
    else:
        found["splits"] = list(callback.results)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other or (one != one and other != other)


def fit(callback: FitEndAnalysis, own: PlainModule, **options: Any) -> None:
    trainer(callback, **options).fit(own, loader(), loader(seed=1))


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_second_fit_has_its_own_numbers_alone(name: str) -> None:
    alone, reused = CALLBACKS[name](), CALLBACKS[name]()
    fit(alone, module(Other), max_epochs=2)
    first = module(PlainModule)
    fit(reused, first, max_epochs=3)
    fit(reused, module(Other), max_epochs=2)
    assert same(state_of(reused), state_of(alone))
    held = weakref.ref(first)
    del first
    gc.collect()
    assert held() is None


def test_the_same_trainer_fits_a_second_model() -> None:
    utilization = CALLBACKS["expert_utilization"]()
    assert isinstance(utilization, ExpertUtilizationCallback)
    run = trainer(utilization, max_epochs=2)
    run.fit(module(PlainModule), loader())
    run.fit_loop.max_epochs = 3
    run.fit(second := module(Other), loader())  # the trainer counts on
    assert {head: [*own] for head, own in utilization.history.items()} == {"head": [2]}
    assert utilization.history["head"][2].counts.numel() == 6
    run.fit_loop.max_epochs = 4
    run.fit(second, loader())  # the same model continues
    assert [*utilization.history["head"]] == [2, 3]
