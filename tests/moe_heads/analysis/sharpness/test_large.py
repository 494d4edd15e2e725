"""Memory of an analysis of a large model, in vectors of the size of its parameters."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis import sharpness

_MOST_VECTORS = 15


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not report the memory")
def test_the_memory_of_a_large_model_is_a_few_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 4096), nn.Tanh(), nn.Linear(4096, 3072), nn.Tanh(), nn.Linear(3072, 1))
    # two samples that are nearly equal, so that one eigenvalue is much larger than the others
    batch = torch.randn(2048) + 0.1 * torch.randn(2, 2048), torch.tensor([[1.0], [2.0]])
    size = sum(p.numel() for p in model.parameters())
    assert size > 20_000_000

    def loss(m: nn.Module, b: Any) -> Tensor:
        return F.mse_loss(m(b[0]), b[1])

    before, peak, is_over = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.002):
            peak = max(peak, resident() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    # five vectors, as GPT-2 small gets by default
    result = sharpness(
        model, loss, [batch], num_eigenvalues=1, trace=False, density=False, basis_memory=5 * 4 * size, max_steps=60
    )
    is_over.set()
    thread.join()
    assert result.eigenvalues_converged and not result.certificate.unchecked and result.certificate.num_double == 2
    print(f"{peak / 4 / size:.1f} vectors, {result.num_products} products")
    assert peak < _MOST_VECTORS * 4 * size, f"{peak / 4 / size:.1f} vectors"
