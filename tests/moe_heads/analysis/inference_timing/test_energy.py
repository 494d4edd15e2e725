"""Energy and clock rates from a fake management library."""

import sys
import types
from typing import Any

import pytest
import torch

from moe_heads.analysis.inference_timing.energy import EnergyMeter, PowerUse


class NVMLError(Exception):
    pass


def library(**changes: Any) -> types.SimpleNamespace:
    energy = iter([0, 10_000, 14_500])
    functions = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(energy),
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1000 * kind,
        "nvmlDeviceGetTemperature": lambda handle, kind: 55,
    }
    return types.SimpleNamespace(**{**functions, **changes})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda:0")


def test_energy_is_the_difference_of_two_readings(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library())
    meter = EnergyMeter(cuda)
    with meter.measure(32):
        pass
    (use,) = meter.uses
    assert use == PowerUse(32, use.seconds, 4.5, 1000, 2000, 55)


def test_without_library_permission_or_gpu_nothing_is_measured(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NVMLError("not supported")

    monkeypatch.setitem(sys.modules, "pynvml", library(nvmlDeviceGetTotalEnergyConsumption=fail))
    meters = [EnergyMeter(cuda), EnergyMeter(torch.device("cpu"))]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for meter in (*meters, EnergyMeter(cuda)):
        with meter.measure(1):
            pass
        assert meter.uses == []
