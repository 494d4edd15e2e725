"""Fixtures shared by all tests."""

import importlib
import os
import random
import signal

# The tests' tensors are small, and on a busy machine a second thread makes them many times slower. Set before torch is
# imported, and inherited by the processes that some tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, and the tests of Ctrl-C send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def without_mean_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that count calls of the loss, or whose loss is no mean: nothing compares batches with their halves."""
    for name in (
        "loss_landscape.direction_sweep",
        "loss_landscape.function",
        "loss_landscape.routing_response",
        "sharpness.function",
        "sharpness.perturbation",
        "sharpness.pyhessian",
    ):
        module = importlib.import_module(f"moe_heads.analysis.{name}")
        monkeypatch.setattr(module, "check_mean", lambda *arguments, **options: None)
