"""Fixtures shared by all tests."""

import os
import random

# The tests' tensors are small, and on a busy machine a second thread makes them many times slower. Set before torch is
# imported, and inherited by the processes that some tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
