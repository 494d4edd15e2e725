import pytest
import torch

from moe_heads.analysis.inference_timing import limits as room
from moe_heads.analysis.inference_timing.flops import Operator
from moe_heads.analysis.inference_timing.limits import Bound, DeviceLimits

CPU = torch.device("cpu")


def limits() -> DeviceLimits:
    """10 GFLOP/s, 1 GB/s whatever the size, 1 µs a launch."""
    known = DeviceLimits(CPU)
    known.peak_flops, known.launch_ms, known.bandwidths = 1e10, 1e-3, {2**power: 1e9 for power in range(16, 29)}
    return known


def test_the_bound_is_the_sum_over_operators_of_the_largest_of_three() -> None:
    arithmetic, memory, launch = Operator(10**7, 10), Operator(10, 10**5), Operator(0, 0)
    assert limits().bound([arithmetic]) == Bound(pytest.approx(1.0), "arithmetic")
    assert limits().bound([memory]) == Bound(pytest.approx(0.1), "memory")
    assert limits().bound([launch] * 3) == Bound(pytest.approx(3e-3), "launches")
    assert limits().bound([arithmetic, memory, launch]) == Bound(pytest.approx(1.101), "arithmetic")


def test_limits_are_measured_once_and_by_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MATRIX", {"cpu": 64})
    measured = DeviceLimits(CPU)
    assert measured.peak_flops == measured.peak_flops > 0
    assert measured.launch_ms == measured.launch_ms > 0
    assert measured.bandwidth(1) == measured.bandwidth(2**16)
    assert measured.bandwidth(2**16 + 1) == measured.bandwidth(2**17)
    assert list(measured.bandwidths) == [2**16, 2**17]
    assert measured.bandwidth(2**40) == measured.bandwidths[2**28]
