"""The programs that a trained module is served as, in the callback."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_heads.callbacks import InferenceTimingCallback
from tests.support.lightning_models import PlainModule, assert_same, loader, snapshot


def test_programs_are_made_from_the_trained_module() -> None:
    seen: list[tuple[bool, Any]] = []

    def served_fn(module: nn.Module, batch: Any) -> dict[str, Any]:
        seen.append((module.training, batch))
        return {"exported": torch.export.export(module, (batch[0],))}

    callback = InferenceTimingCallback(batch_sizes=(8,), num_runs=6, seconds_per_size=0.05, served_fn=served_fn)
    module = PlainModule().train()
    before = snapshot(module)
    result = callback.analyze(module, test=loader())["test"]
    assert_same(before, snapshot(module))
    ((is_training, batch),) = seen
    assert not is_training and len(batch[0]) == 8
    assert [program.name for program in result.served] == ["exported"] and result.served[0].difference < 1e-6


def test_served_fn_is_a_function() -> None:
    with pytest.raises(ValueError, match="served_fn: expected a function"):
        InferenceTimingCallback(served_fn={"exported": None})
