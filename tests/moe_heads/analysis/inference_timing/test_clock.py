import math
import time

import pytest
import torch

from moe_heads.analysis.inference_timing.clock import Clock


def test_a_time_is_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 0)
    assert Clock(torch.device("cpu")).time(lambda: None).wall_ms == 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_time_is_below_wall_time() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    clock = Clock(x.device)
    readings = [clock.time(lambda: x @ x) for _ in range(5)]
    assert all(0 < reading.device_ms <= reading.wall_ms for reading in readings)


def test_wall_time_is_that_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    instants = iter([1_000_000, 3_500_000])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(instants))
    ran = []
    reading = Clock(torch.device("cpu")).time(lambda: ran.append(1))
    assert reading.wall_ms == 2.5
    assert math.isnan(reading.device_ms)
    assert ran == [1]
