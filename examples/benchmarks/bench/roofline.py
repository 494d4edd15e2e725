"""Lower bound of an eager forward pass: max(arithmetic / peak, bytes of the used experts / bandwidth, launches).

Peak and bandwidth are measured on this machine by a matrix product and by a sum over the same number of warm bytes, in
CPU time. The launch time is that of the smallest linear layer. A compiled head fuses launches and may be faster than
the last bound.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moe_heads import SparseMoE

__all__ = ["bound_ms", "measured_limits"]

# the gate, the selection, two products and the combination
_LAUNCHES = 5


def bound_ms(head: SparseMoE, x: Tensor) -> float:
    """Return the lower bound in milliseconds of a forward pass of the rows x on this machine."""
    hit = int((head(x, return_routing=True).routing.stats().counts > 0).sum())
    gate = sum(parameter.numel() for parameter in head.router.active_parameters())
    num_bytes = x.element_size() * (hit * head.experts.parameters_per_expert + gate) + x.nbytes
    arithmetic = head.flops(len(x)).active / (1e6 * _peak_gflops())
    traffic = num_bytes / (1e6 * _bandwidth_gbs(1 << (num_bytes - 1).bit_length()))
    return max(arithmetic, traffic, _LAUNCHES * _launch_ms())


def measured_limits() -> dict[str, float]:
    """Return the measured limits of this machine."""
    return {
        "peak_gflops": round(_peak_gflops(), 1),
        "memory_gbs": round(_bandwidth_gbs(1 << 28), 1),
        "cache_1mib_gbs": round(_bandwidth_gbs(1 << 20), 1),
        "launch_us": round(1e3 * _launch_ms(), 2),
    }


@cache
def _peak_gflops() -> float:
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / 1e6 / _best_ms(lambda: a @ a, 5)


@cache
def _bandwidth_gbs(num_bytes: int) -> float:
    values = torch.ones(num_bytes // 4)
    return num_bytes / 1e6 / _best_ms(values.sum, 7)


@cache
def _launch_ms() -> float:
    x, layer = torch.randn(1, 1), torch.nn.Linear(1, 1)
    return _best_ms(lambda: torch.nn.functional.linear(x, layer.weight, layer.bias), 2000)


def _best_ms(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return min(times)
